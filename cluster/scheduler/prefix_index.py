"""The exact index of which worker holds which KV block. Knows names and workers, not load or time.

Names that were stored together and have the same holders are one run: an integer with a bit per
worker says who holds them all. Following a prompt down its chain takes a step per run and
intersects these sets, so it costs the same for two workers as for two thousand.

A run takes part in a step of more than one block only if the prompt has the same names in the same
order, so holes in a chain (a block evicted before those behind it) and reports in any order are
answered exactly; they only take more steps, until a prompt has shown which blocks belong together.
Blocks that come or leave one by one are put with the one before them, on the guess that they are one chain.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple, assert_never

from diptych.hashing import granules_per_block
from diptych.types import BlockHash, Cleared, Evicted, KvEvent, Stored, WorkerId

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LONGEST_RUN = 128
"""Blocks: what splitting a run may cost."""
_PIECES = 4
"""Runs of the same holders, one behind the other in a prompt: so many are made one, if they are short."""
_SHORT = 16
"""Blocks: to step over more costs little, so only stretches up to that are put with what came before them."""
_GATHERED = 1024
"""Blocks whose runs one prompt may touch for that."""
_SHRINK_BELOW = 8
"""Tables are made anew when so many times smaller than they were: Python's only ever grow."""


class Depth(NamedTuple):
    """Workers that hold exactly so much of a prompt."""

    tokens: int
    holders: int
    """A bit per slot."""


@dataclass(slots=True, eq=False)
class _Run:
    names: list[BlockHash]
    holders: int = 0
    chained: bool = False
    """A prompt had all of these in this order, and perhaps others between: two chains that agree in one name agree in
    all before it."""

    def shared(self, names: Sequence[BlockHash], at: int) -> int:
        """How many of this run's first blocks are `names[at:]`'s first; 1 where the first differ: the caller
        found this run by that name."""
        mine = self.names
        if len(mine) == 1 or mine[0] != names[at]:
            return 1
        span = min(len(mine), len(names) - at)
        if not self.chained:
            if span == 1 or mine[1] != names[at + 1]:
                return 1
            shared = _common(mine, 0, names, at)
            self.chained = shared == len(mine)
            return shared
        if mine[span - 1] == names[at + span - 1]:
            return span
        return bisect_left(range(span), True, key=lambda place: mine[place] != names[at + place])


@dataclass(slots=True)
class _Trail:
    """Of blocks that come, or leave, by a few."""

    run: _Run | None = None
    """Where the last ones were put."""
    source: _Run | None = None
    """The run that they were taken out of."""
    first: int = 0
    """How many the first ones were."""
    latest: int = 0
    """How many the last ones were."""


@dataclass(slots=True)
class _Member:
    slot: int
    block_size: int
    stored: _Trail = field(default_factory=_Trail)
    evicted: _Trail = field(default_factory=_Trail)
    runs: set[_Run] = field(default_factory=set[_Run])
    """The transpose of the index: what makes a worker's departure cost only what it held."""


class PrefixIndex:
    """Memory is proportional to what the workers hold: a name goes with its last holder."""

    def __init__(self) -> None:
        self._runs: dict[BlockHash, _Run] = {}
        self._most = 0
        """Names at the most since the table was made."""
        self._members: dict[WorkerId, _Member] = {}
        self._workers: dict[int, WorkerId] = {}
        self._vacant: list[int] = []
        self._groups: dict[int, int] = {}
        """Block size in tokens -> the set of its workers."""

    def __len__(self) -> int:
        """Distinct block names."""
        return len(self._runs)

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._members

    @property
    def members(self) -> int:
        """Workers, with or without blocks."""
        return len(self._members)

    def slot(self, worker: WorkerId) -> int:
        """The worker's bit, as long as it is a member."""
        return self._members[worker].slot

    def add(self, worker: WorkerId, block_size: int) -> int:
        """A worker that holds nothing yet; returns its slot, the lowest that is vacant."""
        assert worker not in self._members, f"{worker} is already in the index"
        slot = heappop(self._vacant) if self._vacant else len(self._workers)
        self._members[worker] = _Member(slot, block_size)
        self._workers[slot] = worker
        self._groups[block_size] = self._groups.get(block_size, 0) | 1 << slot
        return slot

    def drop(self, worker: WorkerId) -> None:
        """The worker and all it held; its bit goes to the next newcomer."""
        member = self._members.pop(worker)
        self._clear(member)
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
                if len(self._runs) * _SHRINK_BELOW < self._most:
                    self._shrink()
            case Cleared():
                self._clear(member)
            case _:
                assert_never(event)

    def depths(self, granules: Sequence[BlockHash]) -> list[Depth]:
        """How far down a prompt's chain who holds whole blocks of it; who holds none is in none."""
        found: list[Depth] = []
        for block_size, group in self._groups.items():
            stride = granules_per_block(block_size)
            names = tuple(granules) if stride == 1 else tuple(granules[stride - 1 :: stride])
            found += [Depth(blocks * block_size, holders) for blocks, holders in self._descend(names, group)]
        return found

    def longest_prefix(self, granules: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """Leading prompt tokens that each worker holds in whole blocks; absent where it is none."""
        return {worker: tokens for tokens, holders in self.depths(granules) for worker in self.named(holders)}

    def named(self, holders: int) -> Iterator[WorkerId]:
        """The workers of a set."""
        while holders:
            lowest = holders & -holders
            yield self._workers[lowest.bit_length() - 1]
            holders ^= lowest

    def _descend(self, names: Sequence[BlockHash], holders: int) -> list[tuple[int, int]]:
        """(depth, the workers that hold exactly so many leading blocks), without depth 0."""
        found: list[tuple[int, int]] = []
        runs, length = self._runs, len(names)
        depth = begin = pieces = last = 0
        scattered = -1
        """Where many short runs of the same holders begin."""
        while depth < length and (run := runs.get(names[depth])) is not None:
            if run.holders != last:
                pieces, last = 0, run.holders
                deeper = holders & last
                if depth and deeper != holders:
                    found.append((depth, holders ^ deeper))
                holders = deeper
                if not holders:
                    break
                begin = depth
            pieces += 1
            depth += run.shared(names, depth)
            if pieces >= _PIECES and scattered < 0 and 2 * (depth - begin) < pieces * _SHORT:
                scattered = begin
        if scattered >= 0:
            self._gather(names, scattered)
        if holders and depth:
            found.append((depth, holders))
        return found

    # ---- what changes it -------------------------------------------------------------------------

    def _learn(self, member: _Member, names: tuple[BlockHash, ...]) -> None:
        if len(names) > _SHORT or not names or not self._learn_few(member, names):
            member.stored.run = None
            self._learn_all(member, names)
        if len(self._runs) > self._most:
            self._most = len(self._runs)

    def _learn_few(self, member: _Member, names: tuple[BlockHash, ...]) -> bool:
        """Put with those before them, if nobody has any of them, or the same others have them in a row."""
        run, bit = self._runs.get(names[0]), 1 << member.slot
        if run is None:
            return self._grow(member, bit, names)
        if run.holders & bit:
            return False
        start, count = _place(run, names[0]), len(names)
        if count > 1 and _common(run.names, start, names, 0) < count:
            return False
        member.runs.add(self._move(run, start, count, run.holders | bit, member.stored))
        return True

    def _grow(self, member: _Member, bit: int, names: tuple[BlockHash, ...]) -> bool:
        """What comes by equal pieces, the last one perhaps smaller, is taken for one chain."""
        count, trail = len(names), member.stored
        if count > 1 and (len(set(names)) < count or not self._runs.keys().isdisjoint(names)):
            return False
        grown, follows, trail.latest = trail.run, count <= trail.first == trail.latest, count
        if not follows or grown is None or grown.holders != bit or len(grown.names) + count > _LONGEST_RUN:
            grown = trail.run = _Run([], bit)
            trail.first = count
            member.runs.add(grown)
        grown.chained = False
        if count == 1:
            grown.names.append(names[0])
            self._runs[names[0]] = grown
        else:
            grown.names += names
            self._runs.update(dict.fromkeys(names, grown))
        return True

    def _learn_all(self, member: _Member, names: tuple[BlockHash, ...]) -> None:
        at, bit = 0, 1 << member.slot
        while at < len(names):
            run = self._runs.get(names[at])
            if run is None:
                run, count = self._fresh(names, at)
            else:
                run = self._part(run, names, at)
                count = len(run.names)
            at += count
            if not run.holders & bit:
                run.holders |= bit
                member.runs.add(run)

    def _forget(self, member: _Member, names: Sequence[BlockHash]) -> None:
        at, bit = 0, 1 << member.slot
        while at < len(names):
            run, count = self._runs.get(names[at]), 1
            if run is not None and run.holders & bit:
                start = _place(run, names[at])
                if len(names) > 1:
                    count = _common(run.names, start, names, at)
                self._forget_stretch(member, run, start, count)
            at += count

    def _forget_stretch(self, member: _Member, run: _Run, start: int, count: int) -> None:
        names, holders = run.names, run.holders ^ 1 << member.slot
        whole = count == len(names)
        if whole:
            member.runs.discard(run)
        if holders:
            self._move(run, start, count, holders, member.evicted)
        elif count == 1:
            del self._runs[names.pop(start)]
        else:
            for name in names[start : start + count]:
                del self._runs[name]
            del names[start : start + count]
        if whole and not holders:
            run.holders = 0

    def _move(self, run: _Run, start: int, count: int, holders: int, trail: _Trail) -> _Run:
        """A stretch of the run has other holders now: to where the one beside it went, if that was the last one.

        Returns the run that it is in."""
        names, target = run.names, trail.run
        whole = count == len(names)
        follows = trail.source is run and target is not None and target.holders == holders
        if target is None or not follows or len(target.names) + count > _LONGEST_RUN:
            if whole:
                run.holders = holders
                return run
            target = trail.run = _Run([], holders)
            trail.source = run
            self._enter(target)
        elif whole:
            self._leave(run)
        target.chained = False
        # What leaves from its end comes to lie before what left there earlier.
        at = 0 if start and start + count == len(names) else len(target.names)
        if count == 1:
            name = names.pop(start)
            target.names.insert(at, name)
            self._runs[name] = target
        else:
            moved = names[start : start + count]
            del names[start : start + count]
            target.names[at:at] = moved
            self._runs.update(dict.fromkeys(moved, target))
        return target

    def _enter(self, run: _Run) -> None:
        for worker in self.named(run.holders):
            self._members[worker].runs.add(run)

    def _leave(self, run: _Run) -> None:
        for worker in self.named(run.holders):
            self._members[worker].runs.discard(run)
        run.holders = 0

    def _clear(self, member: _Member) -> None:
        runs, member.runs = member.runs, set()
        for run in runs:
            self._release(run, member)
        if len(self._runs) * _SHRINK_BELOW < self._most:
            self._shrink()

    def _release(self, run: _Run, member: _Member) -> None:
        run.holders &= ~(1 << member.slot)
        if not run.holders:
            for name in run.names:
                del self._runs[name]

    def _gather(self, names: Sequence[BlockHash], at: int) -> None:
        """One run of what a prompt has shown to be in order: blocks that were stored one by one or beside others'.

        Done once for a stretch, by a prompt that had to step through it, and bounded in what it costs that prompt.
        """
        stop, touched, holders = at, 0, self._runs[names[at]].holders
        parts: set[_Run] = set()
        while stop < len(names) and stop - at < _LONGEST_RUN and touched < _GATHERED:
            run = self._runs.get(names[stop])
            if run is None or run.holders != holders:
                break
            if run not in parts:
                touched += len(run.names)
                parts.add(run)
            stop += run.shared(names, stop)
        whole = _Run([], holders, chained=True)
        order = dict.fromkeys(names[at:stop], whole)
        whole.names = list(order)
        self._runs.update(order)
        self._enter(whole)
        for part in parts:
            part.names = [name for name in part.names if name not in order]
            if not part.names:
                self._leave(part)

    def _fresh(self, names: tuple[BlockHash, ...], at: int) -> tuple[_Run, int]:
        """A run of the names from `at` on that nobody has yet, and how many of them that were, told twice or not."""
        if at + 1 == len(names):
            run = self._runs[names[at]] = _Run([names[at]])
            return run, 1
        run = _Run([])
        stop = at + _LONGEST_RUN
        fresh = dict.fromkeys(names[at:stop], run)
        if not self._runs.keys().isdisjoint(fresh):
            stop = next(place for place in range(at + 1, len(names)) if names[place] in self._runs)
            fresh = dict.fromkeys(names[at:stop], run)
        run.names = list(fresh)
        self._runs.update(fresh)
        return run, min(stop, len(names)) - at

    def _part(self, run: _Run, names: Sequence[BlockHash], at: int) -> _Run:
        """The stretch of the run that is `names[at:]`'s first, as a run of its own."""
        mine, name = run.names, names[at]
        if len(mine) == 1:
            return run
        start = _place(run, name)
        count = _common(mine, start, names, at)
        if start:
            _, run = self._split(run, start)
        if count < len(run.names):
            run, _ = self._split(run, count)
        return run

    def _split(self, run: _Run, at: int) -> tuple[_Run, _Run]:
        """Before and from `at`. The larger stays the same object: only names of the smaller are told anew."""
        front, back = run.names[:at], run.names[at:]
        moved, kept = (front, back) if len(front) < len(back) else (back, front)
        new = _Run(moved, run.holders, run.chained)
        run.names = kept
        for name in moved:
            self._runs[name] = new
        self._enter(new)
        return (new, run) if moved is front else (run, new)

    def _shrink(self) -> None:
        self._runs = dict(self._runs)
        self._most = max(len(self._runs), 1 << 10)
        for member in self._members.values():
            member.runs = set(member.runs)

    def check(self) -> None:
        """The two directions agree, no name is without a holder, no bit without a worker."""
        runs = set(self._runs.values())
        assert {name: run for run in runs for name in run.names} == self._runs, "a name is in no run or in two"
        assert sum(len(run.names) for run in runs) == len(self._runs), "a run has a name twice"
        assert all(run.holders for run in runs), "a run without a holder"
        for member in self._members.values():
            held = {run for run in runs if run.holders >> member.slot & 1}
            assert held == member.runs, "the index and what its workers hold differ"
        assert self._workers == {member.slot: worker for worker, member in self._members.items()}, "a bit is lost"
        assert sorted([*self._workers, *self._vacant]) == list(range(len(self._workers) + len(self._vacant)))
        for block_size, group in self._groups.items():
            workers = {worker for worker, member in self._members.items() if member.block_size == block_size}
            assert workers == set(self.named(group)) != set(), f"the group of block size {block_size} is wrong"


def _place(run: _Run, name: BlockHash) -> int:
    """Of one of the run's names: mostly the first or the last."""
    names = run.names
    return 0 if names[0] == name else len(names) - 1 if names[-1] == name else names.index(name)


def _common(mine: list[BlockHash], start: int, theirs: Sequence[BlockHash], at: int) -> int:
    """Length of the stretch in which `mine[start:]` and `theirs[at:]` agree; their first do."""
    span = min(len(mine) - start, len(theirs) - at)
    if mine[start : start + span] == list(theirs[at : at + span]):
        return span
    return next(place for place in range(span) if mine[start + place] != theirs[at + place])
