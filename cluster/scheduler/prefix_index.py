"""The exact index of which worker holds which KV block. Knows names and workers, not load or time.

One integer per block name is the set of its holders, a bit per worker. Following a prompt down
its chain intersects these sets, so it costs the same for two workers as for two thousand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, assert_never

from diptych.hashing import block_hashes
from diptych.types import BlockHash, Cleared, Evicted, KvEvent, Stored, WorkerId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(slots=True)
class _Member:
    slot: int
    block_size: int
    names: set[BlockHash] = field(default_factory=set[BlockHash])
    """The transpose of the index: what makes a worker's departure cost only what it held."""


class PrefixIndex:
    """Memory is proportional to what the workers hold: a name goes with its last holder."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, int] = {}
        self._members: dict[WorkerId, _Member] = {}
        self._workers: dict[int, WorkerId] = {}
        self._vacant: list[int] = []
        self._groups: dict[int, int] = {}
        """Block size in tokens -> the set of its workers."""

    def __len__(self) -> int:
        """Distinct block names."""
        return len(self._holders)

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._members

    @property
    def members(self) -> int:
        """Workers, with or without blocks."""
        return len(self._members)

    def add(self, worker: WorkerId, block_size: int) -> None:
        """A worker that holds nothing yet."""
        assert worker not in self._members, f"{worker} is already in the index"
        slot = heappop(self._vacant) if self._vacant else len(self._workers)
        self._members[worker] = _Member(slot, block_size)
        self._workers[slot] = worker
        self._groups[block_size] = self._groups.get(block_size, 0) | 1 << slot

    def drop(self, worker: WorkerId) -> None:
        """The worker and all it held; its bit goes to the next newcomer."""
        member = self._members.pop(worker)
        self._forget(member, tuple(member.names))
        del self._workers[member.slot]
        heappush(self._vacant, member.slot)
        self._groups[member.block_size] &= ~(1 << member.slot)
        if not self._groups[member.block_size]:
            del self._groups[member.block_size]

    def apply(self, worker: WorkerId, event: KvEvent) -> None:
        """What a worker said. Told twice is told once."""
        member = self._members[worker]
        match event:
            case Stored(hashes):
                self._learn(member, hashes)
            case Evicted(hashes):
                self._forget(member, hashes)
            case Cleared():
                self._forget(member, tuple(member.names))
            case _:
                assert_never(event)

    def longest_prefix(self, granules: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """Leading prompt tokens that each worker holds in whole blocks; absent where it is none."""
        tokens: dict[WorkerId, int] = {}
        for block_size, group in self._groups.items():
            for blocks, holders in self._descend(block_hashes(granules, block_size), group):
                tokens.update(dict.fromkeys(self._named(holders), blocks * block_size))
        return tokens

    def _descend(self, names: Iterable[BlockHash], group: int) -> Iterator[tuple[int, int]]:
        """(depth, the workers that hold exactly so many leading blocks), without depth 0."""
        holders, depth = group, 0
        for name in names:
            deeper = holders & self._holders.get(name, 0)
            if depth and deeper != holders:
                yield depth, holders ^ deeper
            holders = deeper
            if not holders:
                return
            depth += 1
        if depth:
            yield depth, holders

    def _named(self, holders: int) -> Iterator[WorkerId]:
        while holders:
            lowest = holders & -holders
            yield self._workers[lowest.bit_length() - 1]
            holders ^= lowest

    def _learn(self, member: _Member, names: Iterable[BlockHash]) -> None:
        bit = 1 << member.slot
        for name in names:
            self._holders[name] = self._holders.get(name, 0) | bit
            member.names.add(name)

    def _forget(self, member: _Member, names: Iterable[BlockHash]) -> None:
        bit = 1 << member.slot
        for name in names:
            if name not in member.names:
                continue
            member.names.remove(name)
            others = self._holders[name] & ~bit
            if others:
                self._holders[name] = others
            else:
                del self._holders[name]

    def check(self) -> None:
        """The two directions agree, no name is without a holder, no bit without a worker."""
        told: dict[BlockHash, int] = {}
        for member in self._members.values():
            for name in member.names:
                told[name] = told.get(name, 0) | 1 << member.slot
        assert told == self._holders, "the index and what its workers hold differ"
        assert self._workers == {member.slot: worker for worker, member in self._members.items()}, "a bit is lost"
        assert sorted([*self._workers, *self._vacant]) == list(range(len(self._workers) + len(self._vacant)))
        for block_size, group in self._groups.items():
            workers = {worker for worker, member in self._members.items() if member.block_size == block_size}
            assert workers == set(self._named(group)) != set(), f"the group of block size {block_size} is wrong"
