"""The cluster as one value: a fold of what workers said and of what was placed on them.

Knows no Ray, clock, socket or rule. An event costs what it changes and not the size of the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, assert_never

from cluster.scheduler.backlog import TRANSIT_SECONDS, Backlog
from cluster.scheduler.events import (
    Event,
    Reported,
    RequestFinished,
    RequestPlaced,
    RoleChanged,
    TimePassed,
    WorkerDrains,
    WorkerJoined,
    WorkerLeft,
)
from cluster.scheduler.fleet import Fleet
from cluster.scheduler.learning import Learning, implied_step
from cluster.scheduler.prefix_index import PrefixIndex
from cluster.scheduler.promises import Promises
from cluster.scheduler.usual import Usual
from diptych.hashing import GRANULE
from diptych.types import Cleared, Counters, Load, Report, Role, WorkerId, WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.scheduler.fleet import Array
    from diptych.types import BlockHash


# ---- the view ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker, as it said itself."""

    info: WorkerInfo
    slot: int
    """Its column in the fleet and its bit in the index."""
    load: Load
    heard: float
    """When it joined or last reported."""
    counters: Counters = field(default_factory=Counters)
    number: int | None = None
    """Of its last report; None before the first."""
    needs_full: bool = False
    """Reports were lost: its index entries are a guess until it tells everything anew."""
    stale: bool = False
    draining: bool = False

    @property
    def placeable(self) -> bool:
        """Whether it gets new work."""
        return not self.stale and not self.draining


class _Coming(NamedTuple):
    """A request that will decode on a worker and that its reports don't show yet."""

    shown_at: float
    blocks: int
    context_tokens: float


class ClusterView:
    """Owned by one scheduler, which alone applies events; everyone else only reads.

    A restarted scheduler starts empty: each worker joins again, its next report leaves a gap,
    and one full report later all is known.
    """

    def __init__(self, *, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._workers: dict[WorkerId, WorkerView] = {}
        self._ids: tuple[WorkerId | None, ...] = ()
        self._hosts: dict[WorkerId, float] = {}
        self._host_numbers: dict[str, float] = {}
        self._index = PrefixIndex()
        self._promises = Promises()
        # By slot, as the fleet's columns are.
        self._backlogs: dict[int, Backlog] = {}
        self._coming: dict[int, list[_Coming]] = {}
        self._turns: dict[int, int] = {}
        self._requests_placed = 0
        self._look_at = 0.0
        """Nobody can be stale before."""
        self.usual = Usual()
        self.fleet = Fleet()
        self.learning = Learning(self.fleet)

    @property
    def workers(self) -> Mapping[WorkerId, WorkerView]:
        """In the order in which they joined."""
        return MappingProxyType(self._workers)

    @property
    def ids(self) -> Sequence[WorkerId | None]:
        """By slot; replaced, never changed."""
        return self._ids

    @property
    def requests_placed(self) -> int:
        """Also the turn by which ties rotate."""
        return self._requests_placed

    @property
    def index_blocks(self) -> int:
        """Distinct block names in the index."""
        return len(self._index)

    def pool(self, role: Role) -> list[WorkerView]:
        """Those that can be placed on."""
        return [worker for worker in self._workers.values() if worker.info.role == role and worker.placeable]

    def longest_prefix(self, granules: Sequence[BlockHash]) -> Mapping[WorkerId, int]:
        """Leading prompt tokens that each worker holds; absent where it is none."""
        return self._index.longest_prefix(granules)

    def held_tokens(self, granules: Sequence[BlockHash]) -> Array:
        """As `longest_prefix`, by slot."""
        return self.fleet.spread(self._index.depths(granules))

    def held_depths(self, granules: Sequence[BlockHash]) -> Sequence[tuple[int, int]]:
        """As `longest_prefix`: (tokens, a bit for the slot of each who holds so many)."""
        return self._index.depths(granules)

    def promised_depths(self, granules: Sequence[BlockHash], at: float) -> Sequence[tuple[int, int]]:
        """What workers will hold of it when they have done what was placed there, as `held_depths`; in whole blocks
        where all workers' are of one size."""
        whole = self.fleet.block_size or GRANULE
        promised = self._promises.depths(granules, at)
        return [(depth * GRANULE // whole * whole, holders) for depth, holders in promised]

    def apply(self, event: Event) -> None:
        """Fold one event in. What an unknown or buried worker says is ignored, not resurrected."""
        match event:
            case TimePassed(at=at):
                if at > self._look_at:
                    self._time_passed(at)
            case RequestPlaced():
                self._request_placed(event)
            case Reported(report=report, at=at):
                if self._is_current(report.worker, report.epoch):
                    self._reported(report, at)
            case WorkerJoined():
                self._joined(event)
            case WorkerLeft(worker=worker, epoch=epoch):
                if self._is_current(worker, epoch):
                    self._remove(worker)
            case WorkerDrains(worker=worker, epoch=epoch):
                if self._is_current(worker, epoch):
                    self._reopen(replace(self._workers[worker], draining=True))
            case RoleChanged(worker=worker, epoch=epoch):
                if self._is_current(worker, epoch):
                    self._role_changed(event)
            case RequestFinished(outcome=outcome):
                self.learning.finished(outcome)
            case _:
                assert_never(event)

    def check(self) -> None:
        """The index and the fleet know exactly the workers we know."""
        self._index.check()
        assert all(self._index.slot(id_) == worker.slot for id_, worker in self._workers.items()), "a slot is wrong"
        assert self._index.members == len(self._workers), "the index knows a worker we don't"
        for id_, worker in self._workers.items():
            assert self._ids[worker.slot] == id_, f"{id_} is not at its slot"
            placeable = self.fleet.pool(worker.info.role)[worker.slot] == 0
            assert placeable == worker.placeable, f"{id_} is placed on though it shouldn't be, or not though it should"
        assert int(self.fleet.alive.sum()) == sum(not worker.stale for worker in self._workers.values())

    def _is_current(self, worker: WorkerId, epoch: int) -> bool:
        known = self._workers.get(worker)
        return known is not None and known.info.epoch == epoch

    # ---- workers ---------------------------------------------------------------------------------

    def _joined(self, event: WorkerJoined) -> None:
        info = event.info
        known = self._workers.get(info.id)
        if known is not None and known.info.epoch >= info.epoch:
            return
        if known is not None:
            self._remove(info.id)
        slot = self._index.add(info.id, info.layout.block_size)
        self._workers[info.id] = WorkerView(info=info, slot=slot, load=Load(blocks_free=info.blocks), heard=event.at)
        self._backlogs[slot], self._coming[slot], self._turns[slot] = Backlog(), [], 0
        self._ids = (*self._ids[:slot], *(None,) * (slot - len(self._ids)), info.id, *self._ids[slot + 1 :])
        self._hosts[info.id] = self._host_numbers.setdefault(info.host, float(len(self._host_numbers)))
        self._admit(info, slot)
        self._look_at = min(self._look_at, event.at + self._stale_seconds)

    def _admit(self, info: WorkerInfo, slot: int) -> None:
        fleet = self.fleet
        fleet.vacate(slot)
        fleet.block_tokens[slot] = info.layout.block_size
        fleet.token_bytes[slot] = info.layout.block_bytes * info.layout.shards / info.layout.block_size
        fleet.most_tokens[slot] = info.max_context
        fleet.settle(slot, self._hosts[info.id])
        fleet.room_tokens[slot] = info.blocks * info.layout.block_size
        fleet.open(slot, info.role, placeable=True, alive=True)
        self.learning.join(info.id, slot, info.device)

    def _remove(self, worker: WorkerId) -> None:
        slot = self._workers.pop(worker).slot
        self._index.drop(worker)
        self._promises.revoke(1 << slot)
        self._ids = (*self._ids[:slot], None, *self._ids[slot + 1 :])
        self.learning.leave(worker)
        self.fleet.vacate(slot)
        del self._backlogs[slot], self._coming[slot], self._turns[slot], self._hosts[worker]

    def _reopen(self, worker: WorkerView) -> None:
        """It may be placed on, or not any more."""
        self._workers[worker.info.id] = worker
        self.fleet.open(worker.slot, worker.info.role, placeable=worker.placeable, alive=not worker.stale)

    def _role_changed(self, event: RoleChanged) -> None:
        worker = self._workers[event.worker]
        self.fleet.open(worker.slot, worker.info.role, placeable=False, alive=True)
        self._reopen(replace(worker, info=replace(worker.info, role=event.role)))

    def _reported(self, report: Report, at: float) -> None:
        worker = self._workers[report.worker]
        expected = 0 if worker.number is None else worker.number + 1
        if report.number < expected:
            return
        # A load is whole in itself; only cache events lean on the reports before them.
        needs_full = not report.full and (worker.needs_full or report.number > expected)
        self._workers[report.worker] = WorkerView(
            info=worker.info,
            slot=worker.slot,
            load=report.load,
            counters=report.counters,
            heard=at,
            number=report.number,
            needs_full=needs_full,
            draining=worker.draining,
        )
        if worker.stale:
            self._reopen(self._workers[report.worker])
        if report.full:
            self._index.apply(report.worker, Cleared())
        if not needs_full:
            for event in report.events:
                if isinstance(event, Cleared):
                    self._promises.revoke(1 << worker.slot)
                self._index.apply(report.worker, event)
        self.learning.reported(report, self._hosts, implied_step(worker, report, at))
        self._count(self._workers[report.worker], at)

    def _count(self, worker: WorkerView, at: float) -> None:
        """What the worker reported, and what it can't have seen yet."""
        fleet, slot, load, info = self.fleet, worker.slot, worker.load, worker.info
        coming = [one for one in self._coming[slot] if one.shown_at > at]
        self._coming[slot] = coming
        blocks = sum(one.blocks for one in coming)
        alone = max(load.waiting_requests, len(coming))
        fleet.requests[slot] = load.running_requests + alone
        fleet.rank(slot, self._turns[slot])
        room = load.blocks_free + load.blocks_cached - max(0, blocks - load.blocks_granted)
        fleet.room_tokens[slot] = room * info.layout.block_size
        if info.role != "prefill":
            held = load.blocks_held * info.layout.block_size
            fleet.rows[slot] = load.running_requests + alone
            fleet.context_tokens[slot] = held + sum(one.context_tokens for one in coming)
            fleet.sum_step(slot)
        left = self._backlogs[slot].reported(at, load.waiting_tokens, fleet.token_seconds.item(slot))
        for rank, seconds in enumerate(left):
            fleet.idle_at[rank, slot] = at + seconds

    # ---- requests --------------------------------------------------------------------------------

    def _request_placed(self, event: RequestPlaced) -> None:
        placement, at = event.placement, event.at
        predicted = placement.predicted
        assert predicted is not None, "a placement without a prediction"
        self.usual.add(predicted.ttft_seconds)
        self._requests_placed += 1
        first_at = at + predicted.ttft_seconds
        decodes = self._workers[placement.decode].slot
        computes = decodes if placement.prefill is None else self._workers[placement.prefill].slot
        self._backlogs[computes].place(at, event.rank, event.tokens, event.seconds)
        self.fleet.queue(computes, event.rank, at, event.seconds)
        if computes != decodes:
            self.fleet.requests[computes] = self.fleet.requests.item(computes) + 1.0
            self._choose(computes)
        shown_at = TRANSIT_SECONDS + (at if computes == decodes else first_at)
        self._coming[decodes].append(_Coming(shown_at, event.blocks, event.context_tokens))
        self.fleet.join_rows(decodes, event.blocks, event.context_tokens)
        self._choose(decodes)
        # Until it is cached, and as long again: the truth takes its place when it is reported.
        holders = (event.tokens > GRANULE) << computes | (event.blocks > 1) << decodes
        if holders:
            self._promises.make(event.granules, holders, at, 2 * first_at - at + 1.0)
        self.learning.expect(event.request, placement.how, predicted)

    def _choose(self, slot: int) -> None:
        self._turns[slot] = self._requests_placed
        self.fleet.rank(slot, self._requests_placed)

    # ---- time ------------------------------------------------------------------------------------

    def _time_passed(self, at: float) -> None:
        oldest = at
        for worker in tuple(self._workers.values()):
            stale = at - worker.heard > self._stale_seconds
            if not stale:
                oldest = min(oldest, worker.heard)
            if stale and not worker.stale:
                self._reopen(replace(worker, stale=stale))
        self._look_at = oldest + self._stale_seconds
