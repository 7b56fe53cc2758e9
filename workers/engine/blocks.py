"""The block pool: who holds which KV block, and which content can be used again.

Knows ids, owners and names; not tensors, devices, requests or the network.

Every block is in exactly one place:

    free ──take──▶ held ◀──acquire── cached      held     a sequence computes with it
      │             │ ╲─────release────▶ ▲       granted  promised to a hand-off, nothing in it yet
      │             │        (named)     │       lent     computed, waits for a hand-off to end
      ╰──grant──▶ granted ──commit──▶ held       cached   nobody's; content kept until evicted
                  lent ◀──lend── held            free     nobody's; no content

What several owners share is held if a sequence is among them, else granted, else lent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from diptych.types import BlockId
from workers.engine.block_names import BlockNames
from workers.engine.eviction import make_order

if TYPE_CHECKING:
    from collections.abc import MutableSequence, Sequence

    from diptych.types import BlockHash, Eviction, KvEvent

Kind: TypeAlias = Literal["sequence", "ticket", "lease"]
_KINDS: tuple[Kind, ...] = ("sequence", "ticket", "lease")
"""In order of precedence for a block that several kinds of owner share."""


@dataclass(slots=True)
class _Owner:
    kind: Kind
    blocks: dict[BlockId, None] = field(default_factory=dict[BlockId, None])
    """A dict for its order (the chain's) and for O(1) removal."""


class BlockPool:
    """`size` blocks. Not thread-safe: the engine's thread is the one owner.

    An owner is a name (of a request, ticket or lease) and exists while it holds blocks.
    """

    def __init__(self, size: int, generations: MutableSequence[int] | None = None, eviction: Eviction = "lru") -> None:
        """`generations`: where others can see them; `size` zeros."""
        self._size = size
        self._free = [BlockId(block) for block in reversed(range(size))]
        self._cached = make_order(eviction, size)
        self._owners: dict[str, _Owner] = {}
        self._refs: dict[Kind, list[int]] = {kind: [0] * size for kind in _KINDS}
        self._in_use: dict[Kind, int] = dict.fromkeys(_KINDS, 0)
        self._names = BlockNames(size)
        self._generations = [0] * size if generations is None else generations

    # ---- counts: free + cached + held + granted + lent == size --------------------------------

    @property
    def size(self) -> int:
        """All blocks."""
        return self._size

    @property
    def free(self) -> int:
        """Nobody's, without content."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Nobody's, content kept until the room is needed."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """What `take` and `grant` can give: free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """In use by sequences."""
        return self._in_use["sequence"]

    @property
    def granted(self) -> int:
        """Promised to hand-offs and to nothing else."""
        return self._in_use["ticket"]

    @property
    def lent(self) -> int:
        """Kept only until a hand-off ends."""
        return self._in_use["lease"]

    # ---- room ---------------------------------------------------------------------------------

    def take(self, count: int, owner: str) -> list[BlockId] | None:
        """`count` blocks for new content, or None and no change when there are too few.

        A new owner is a sequence. Evicts in the order of `eviction`, leaves first.
        """
        return self._take(count, owner, "sequence")

    def grant(self, count: int, owner: str) -> list[BlockId] | None:
        """As `take`, for a ticket: the blocks can't be named until `commit`."""
        assert self.kind(owner) in (None, "ticket"), f"{owner} is a {self.kind(owner)}, not a ticket"
        return self._take(count, owner, "ticket")

    def commit(self, ticket: str, owner: str) -> list[BlockId]:
        """The hand-off landed: all that `ticket` held is now `owner`'s, in the same order."""
        assert self.kind(ticket) == "ticket", f"{ticket} is {self.kind(ticket)}, not an open ticket"
        blocks = list(self._owners[ticket].blocks)
        if ticket == owner:
            self.retag(owner, "sequence")
            return blocks
        # Referenced by the new owner before the old one lets go: never unowned in between.
        for block in blocks:
            self._hold(block, owner, "sequence")
        self.release(ticket)
        return blocks

    # ---- reuse --------------------------------------------------------------------------------

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading names are here, in use or cached."""
        return len(self._names.leading(hashes))

    def acquire(self, hashes: Sequence[BlockHash], owner: str) -> list[BlockId]:
        """The leading blocks that are here, now `owner`'s too."""
        blocks = self._names.leading(hashes)
        for block in blocks:
            if block in self._cached:
                self._cached.remove(block)
            self._hold(block, owner, "sequence")
        return blocks

    def name(self, block: BlockId, name: BlockHash, owner: str) -> bool:
        """The block's content is complete. False: another block has that name, this one stays anonymous."""
        assert block in self._owners[owner].blocks, f"{owner} does not hold block {block}"
        assert self._owners[owner].kind != "ticket", f"{owner} is not committed: block {block} has no content"
        if not self._names.give(block, name):
            return False
        self._cached.named(block, name)
        return True

    # ---- owners -------------------------------------------------------------------------------

    def release(self, owner: str) -> int:
        """The owner lets go of everything; how many blocks that were (0 for a stranger)."""
        state = self._owners.pop(owner, None)
        if state is None:
            return 0
        self._drop_all(list(state.blocks), state.kind)
        return len(state.blocks)

    def release_blocks(self, blocks: Sequence[BlockId], owner: str) -> None:
        """The owner lets go of these, given in chain order."""
        state = self._owners[owner]
        for block in blocks:
            del state.blocks[block]
        self._drop_all(blocks, state.kind)
        if not state.blocks:
            del self._owners[owner]

    def lend(self, owner: str) -> None:
        """The owner's compute is over; it keeps its blocks until a hand-off ends."""
        self.retag(owner, "lease")

    def retag(self, owner: str, kind: Kind) -> None:
        """What the owner is from now on. An owner of nothing has no kind: no change."""
        state = self._owners.get(owner)
        if state is None:
            return
        for block in state.blocks:
            self._count(block, -1)
            self._refs[state.kind][block] -= 1
            self._refs[kind][block] += 1
            self._count(block, +1)
        state.kind = kind

    def kind(self, owner: str) -> Kind | None:
        """None when the owner holds nothing."""
        state = self._owners.get(owner)
        return state.kind if state else None

    def owners(self) -> tuple[str, ...]:
        """Everyone who holds a block: what an audit compares with the requests that live."""
        return tuple(self._owners)

    def blocks_of(self, owner: str) -> list[BlockId]:
        """In the order in which the owner got them."""
        state = self._owners.get(owner)
        return list(state.blocks) if state else []

    def generation(self, block: BlockId) -> int:
        """How often the block was taken for new content: a promise of an older one is void."""
        return self._generations[block]

    # ---- what the scheduler hears -------------------------------------------------------------

    def events(self) -> list[KvEvent]:
        """The net change in names since the last call: what came and went in between is not told."""
        return self._names.events()

    def snapshot(self) -> tuple[BlockHash, ...]:
        """All names, for a full report. It replaces pending `events`: drain those first."""
        return self._names.snapshot()

    def clear(self) -> None:
        """Cached content is forgotten; what is in use stays, with its names."""
        while self._cached:
            self._free.append(self._evict())

    # ---- inside -------------------------------------------------------------------------------

    def _take(self, count: int, owner: str, kind: Kind) -> list[BlockId] | None:
        if count > self.available:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._generations[block] += 1
            self._cached.taken(block)
            self._hold(block, owner, kind)
        return blocks

    def _evict(self) -> BlockId:
        block = self._cached.pop(self._names.name_of)
        self._names.forget(block)
        return block

    def _hold(self, block: BlockId, owner: str, kind: Kind) -> None:
        state = self._owners.get(owner)
        if state is None:
            state = self._owners[owner] = _Owner(kind)
        assert block not in state.blocks, f"{owner} already holds block {block}"
        state.blocks[block] = None
        self._count(block, -1)
        self._refs[state.kind][block] += 1
        self._count(block, +1)

    def _drop_all(self, chain: Sequence[BlockId], kind: Kind) -> None:
        """Leaf first."""
        for place in reversed(range(len(chain))):
            # An anonymous block has a twin whose name it couldn't get; nothing is known to hang from it.
            parent = chain[place - 1] if place and self._names.is_named(chain[place - 1]) else None
            self._drop(chain[place], kind, parent, is_end=place == len(chain) - 1)

    def _drop(self, block: BlockId, kind: Kind, parent: BlockId | None, *, is_end: bool) -> None:
        self._count(block, -1)
        self._refs[kind][block] -= 1
        if self._place(block) is not None:
            self._count(block, +1)
        elif self._names.is_named(block):
            self._cached.push(block, parent, is_end=is_end)
        else:
            self._free.append(block)

    def _place(self, block: BlockId) -> Kind | None:
        for kind in _KINDS:
            if self._refs[kind][block]:
                return kind
        return None

    def _count(self, block: BlockId, change: int) -> None:
        place = self._place(block)
        if place is not None:
            self._in_use[place] += change

    def check(self) -> None:
        """Every block in exactly one place, every reference with its owner, every name findable."""
        refs: dict[Kind, list[int]] = {kind: [0] * self._size for kind in _KINDS}
        for name, state in self._owners.items():
            assert state.blocks, f"{name} owns nothing"
            for block in state.blocks:
                refs[state.kind][block] += 1
        assert refs == self._refs, "reference counts and owners differ"
        used = [BlockId(block) for block in range(self._size) if self._place(BlockId(block)) is not None]
        places = [*self._free, *self._cached, *used]
        assert len(places) == len(set(places)) == self._size, "a block is lost or in two places"
        for kind in _KINDS:
            assert self._in_use[kind] == sum(self._place(block) == kind for block in used), f"{kind} miscounted"
        self._names.check()
        self._cached.check()
        assert all(self._names.is_named(block) for block in self._cached), "a cached block has no name"
        assert not any(self._names.is_named(block) for block in self._free), "a free block has a name"
