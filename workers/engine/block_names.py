"""Which block has which content, and what of that the scheduler was not told yet. Knows no owners."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diptych.types import BlockHash, BlockId, Evicted, KvEvent, Stored

if TYPE_CHECKING:
    from collections.abc import Sequence


class BlockNames:
    """A name has one block and a block at most one name."""

    def __init__(self, size: int) -> None:
        self._names: list[BlockHash | None] = [None] * size
        self._blocks: dict[BlockHash, BlockId] = {}
        self._stored: dict[BlockHash, None] = {}
        self._evicted: dict[BlockHash, None] = {}

    def is_named(self, block: BlockId) -> bool:
        """Whether the block has content that can be found."""
        return self._names[block] is not None

    def name_of(self, block: BlockId) -> BlockHash | None:
        """None while its content can't be found."""
        return self._names[block]

    def leading(self, names: Sequence[BlockHash]) -> list[BlockId]:
        """The blocks of the leading names that are here."""
        blocks: list[BlockId] = []
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def give(self, block: BlockId, name: BlockHash) -> bool:
        """False when another block has that name: this one stays anonymous."""
        if name in self._blocks:
            return self._blocks[name] == block
        assert self._names[block] is None, f"block {block} already has another name"
        self._names[block] = name
        self._blocks[name] = block
        _note(name, self._stored, cancels=self._evicted)
        return True

    def forget(self, block: BlockId) -> None:
        """The block's content is gone."""
        name = self._names[block]
        assert name is not None, f"block {block} has no name"
        self._names[block] = None
        del self._blocks[name]
        _note(name, self._evicted, cancels=self._stored)

    def events(self) -> list[KvEvent]:
        """The net change since the last call: what came and went in between is not told."""
        gone, here = tuple(self._evicted), tuple(self._stored)
        self._evicted.clear()
        self._stored.clear()
        return [*([Evicted(gone)] if gone else []), *([Stored(here)] if here else [])]

    def snapshot(self) -> tuple[BlockHash, ...]:
        """All names."""
        return tuple(self._blocks)

    def check(self) -> None:
        """Both directions agree, and so does what is still to be told."""
        named = [(name, block) for block, name in enumerate(self._names) if name is not None]
        assert dict(named) == self._blocks, "a name is lost"
        assert len(named) == len(self._blocks), "two blocks share a name"
        assert not self._stored.keys() & self._evicted.keys(), "stored and evicted at once"
        assert self._stored.keys() <= self._blocks.keys(), "to be told as stored and not here"
        assert not self._evicted.keys() & self._blocks.keys(), "to be told as evicted and here"


def _note(name: BlockHash, pending: dict[BlockHash, None], *, cancels: dict[BlockHash, None]) -> None:
    if name in cancels:
        del cancels[name]
    else:
        pending[name] = None
