"""The order in which unused blocks lose their content. Knows ids, ages and names, not owners.

    Recency   unused for longest first
    Reuse     least likely to be used again first, as learned from what was

In either no block outlives the one it hangs from: a chain is only ever used from its root.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol, TypeAlias

from diptych.types import BlockId
from workers.engine.reuse_odds import ReuseOdds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.types import BlockHash, Eviction

_MOST_USES = 4
"""Content used so often or more is one class."""
_CLASSES = 2 * _MOST_USES
"""By uses, and whether it is the end of a chain."""


class EvictionOrder(Protocol):
    """Whoever pushes a chain pushes its leaf first."""

    def __len__(self) -> int: ...

    def __contains__(self, block: BlockId) -> bool: ...

    def __iter__(self) -> Iterator[BlockId]:
        """In no order."""
        ...

    def taken(self, block: BlockId) -> None:
        """For new content: the order's clock."""

    def named(self, block: BlockId, name: BlockHash) -> None:
        """Its content is complete."""

    def push(self, block: BlockId, parent: BlockId | None, *, is_end: bool) -> None:
        """Just used. `parent`: what it hangs from, `is_end`: nothing of its owner's hangs from it."""

    def remove(self, block: BlockId) -> None:
        """In use again."""

    def pop(self, name_of: NameOf) -> BlockId:
        """The next to lose its content."""
        ...

    def check(self) -> None:
        """What it keeps agrees with itself."""


class NameOf(Protocol):
    """A block's name, if it has one."""

    def __call__(self, block: BlockId, /) -> BlockHash | None: ...


def make_order(eviction: Eviction, size: int) -> EvictionOrder:
    """Of a pool of `size` blocks."""
    return Reuse(size) if eviction == "reuse" else Recency()


class Recency:
    """A leaf is never younger than its parent, so plain recency is leaf-first."""

    def __init__(self) -> None:
        # An OrderedDict and not a dict: taking the first key of a dict that lost many is O(n).
        self._order: OrderedDict[BlockId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._order

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self._order)

    def taken(self, block: BlockId) -> None:
        """Recency needs no clock."""

    def named(self, block: BlockId, name: BlockHash) -> None:
        """Nor names."""

    def push(self, block: BlockId, parent: BlockId | None, *, is_end: bool) -> None:
        del parent, is_end
        assert block not in self._order, f"block {block} waits for eviction twice"
        self._order[block] = None

    def remove(self, block: BlockId) -> None:
        del self._order[block]

    def pop(self, name_of: NameOf) -> BlockId:
        del name_of
        return self._order.popitem(last=False)[0]

    def check(self) -> None:
        """Nothing can disagree."""


_Gone: TypeAlias = tuple[int, int, int]
"""Of evicted content: class, since when it was unused, uses. If its name returns, that is learned."""


class Reuse:
    """Every class is a queue by recency; of the queues' heads the one least likely to be used goes.

    Only what nothing hangs from is in a queue. After a leaf its parent is next, if it was last used
    with it. A decision is O(log n), all else O(1), but for learning: once in a quarter of a pool.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._odds = ReuseOdds(_CLASSES, size)
        self._leaves: tuple[list[tuple[int, BlockId]], ...] = tuple([] for _ in range(_CLASSES))
        """Heaps of push and block; what was used or hung from since is still in them."""
        self._gone: OrderedDict[BlockHash, _Gone] = OrderedDict()
        """At most `size`, the longest gone first."""
        self._next: BlockId | None = None
        """A leaf that is in no queue: as little likely to be used as the one that hung from it, which just went."""
        self._now = self._pushes = self._count = 0
        """`_now`: blocks taken so far."""
        # ---- by block -------------------------------------------------------------------------------
        self._group: list[int | None] = [None] * size
        """Its class while it is unused."""
        self._since = [0] * size
        self._push = [0] * size
        """The number of its last push: who is unused for longest, among equals."""
        self._parent: list[BlockId | None] = [None] * size
        self._children = [0] * size
        """Unused blocks that hang from it."""
        self._uses = [1] * size

    def __len__(self) -> int:
        return self._count

    def __contains__(self, block: BlockId) -> bool:
        return self._group[block] is not None

    def __iter__(self) -> Iterator[BlockId]:
        return (BlockId(block) for block, group in enumerate(self._group) if group is not None)

    def taken(self, block: BlockId) -> None:
        self._now += 1
        self._uses[block] = 1

    def named(self, block: BlockId, name: BlockHash) -> None:
        gone = self._gone.pop(name, None)
        if gone is not None:
            group, since, uses = gone
            self._odds.used(group, since, self._now)
            self._uses[block] = uses + 1

    def push(self, block: BlockId, parent: BlockId | None, *, is_end: bool) -> None:
        assert self._group[block] is None, f"block {block} waits for eviction twice"
        self._settle()
        group = min(self._uses[block], _MOST_USES) - 1 + (_MOST_USES if is_end else 0)
        self._group[block], self._since[block], self._parent[block] = group, self._now, parent
        self._push[block] = self._pushes
        self._pushes += 1
        self._count += 1
        self._odds.began(group, self._now)
        if parent is not None:
            self._children[parent] += 1
        if not self._children[block]:
            self._queue(block, group)

    def remove(self, block: BlockId) -> None:
        self._settle()
        group = self._leave(block)
        self._settle()
        self._odds.used(group, self._since[block], self._now)
        self._uses[block] += 1

    def pop(self, name_of: NameOf) -> BlockId:
        block = self._next
        if block is None:
            self._odds.learn(self._now)
            block = self._least_likely()
        self._next = None
        group, name = self._leave(block), name_of(block)
        assert name is not None, f"block {block} is cached without a name"
        self._gone[name] = group, self._since[block], self._uses[block]
        if len(self._gone) > self._size:
            _, (group, since, _) = self._gone.popitem(last=False)
            self._odds.lost(group, since, self._now)
        return block

    # ---- inside ---------------------------------------------------------------------------------------

    def _least_likely(self) -> BlockId:
        index, now = self._odds.index, self._now
        best: tuple[float, int, BlockId] | None = None
        for group, heap in enumerate(self._leaves):
            while heap and not self._is_queued(group, *heap[0]):
                heappop(heap)
            if heap:
                push, block = heap[0]
                likely = index[group][(now - self._since[block]).bit_length()] if index else 0.0
                if best is None or (likely, push) < best[:2]:
                    best = likely, push, block
        assert best is not None, "every cached block hangs from another"
        return best[2]

    def _is_queued(self, group: int, push: int, block: BlockId) -> bool:
        return self._push[block] == push and self._group[block] == group and not self._children[block]

    def _queue(self, block: BlockId, group: int) -> None:
        heap = self._leaves[group]
        heappush(heap, (self._push[block], block))
        if len(heap) > 2 * self._size:
            heap[:] = sorted({entry for entry in heap if self._is_queued(group, *entry)})

    def _leave(self, block: BlockId) -> int:
        group, parent = self._group[block], self._parent[block]
        assert group is not None, f"block {block} does not wait for eviction"
        self._group[block] = self._parent[block] = None
        self._count -= 1
        if parent is not None:
            self._children[parent] -= 1
            above = self._group[parent]
            if above is not None and not self._children[parent]:
                self._bare(parent, above, like=above == group and self._since[parent] == self._since[block])
        return group

    def _bare(self, block: BlockId, group: int, *, like: bool) -> None:
        """Nothing hangs from it any more; `like` what hung from it last, it is as little likely to be used."""
        if like and self._next is None:
            self._next = block
        else:
            self._queue(block, group)

    def _settle(self) -> None:
        """Into its queue: what was least likely may not be for long."""
        if self._next is not None:
            group = self._group[self._next]
            assert group is not None, f"block {self._next} is next and not cached"
            self._queue(self._next, group)
            self._next = None

    def check(self) -> None:
        unused = list(self)
        assert len(unused) == self._count, "miscounted"
        children = [0] * self._size
        for parent in self._parent:
            if parent is not None:
                children[parent] += 1
        assert children == self._children, "who hangs from whom is miscounted"
        queued = {
            block
            for group, heap in enumerate(self._leaves)
            for push, block in heap
            if self._is_queued(group, push, block)
        }
        if self._next is not None:
            queued.add(self._next)
        assert queued == {block for block in unused if not children[block]}, "a leaf is not in its queue"
        assert len(self._gone) <= self._size, "remembers more than a pool"
        self._odds.check()
