"""The cluster as one value: a fold of what workers said and of what was placed on them.

Knows no Ray, clock, socket or policy. Workers are frozen; a fold replaces one of them and touches
the index, so that an event costs what it changes and not the size of the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias, assert_never

from cluster.scheduler.prefix_index import PrefixIndex
from diptych.types import Cleared, Counters, Load, Report, Role, WorkerId, WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diptych.types import BlockHash


# ---- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """`at` is monotonic seconds, here and below."""

    info: WorkerInfo
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft:
    """That incarnation of the worker is gone, by its own word or by its pool's."""

    worker: WorkerId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A worker's report arrived."""

    report: Report
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlaced:
    """A decision of ours, counted against its workers until they next report."""

    computes: WorkerId
    tokens: int
    """Prompt tokens to compute there."""
    decodes: WorkerId
    blocks: int
    """Blocks the prompt takes there that it does not share with what is cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePassed:
    """It is now `at`: who was silent for too long is stale."""

    at: float


Event: TypeAlias = WorkerJoined | WorkerLeft | Reported | RequestPlaced | TimePassed


# ---- the view ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker, as far as we know."""

    info: WorkerInfo
    load: Load
    heard: float
    """When it joined or last reported."""
    counters: Counters = field(default_factory=Counters)
    number: int | None = None
    """Of its last report; None before the first."""
    needs_full: bool = False
    """Reports were lost: its index entries are a guess until it tells everything anew."""
    stale: bool = False
    placed_tokens: int = 0
    """Placed here since the last report: not in `load` yet. So a burst between two reports
    does not all land where the last report found room."""
    placed_requests: int = 0
    placed_blocks: int = 0

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to compute here before a newcomer's."""
        return self.load.waiting_tokens + self.placed_tokens

    @property
    def requests(self) -> int:
        """Running, waiting and on their way here."""
        return self.load.running_requests + self.load.waiting_requests + self.placed_requests

    @property
    def room(self) -> int:
        """Blocks a newcomer could have now; negative when more is on its way than fits."""
        return self.load.blocks_free + self.load.blocks_cached - self.placed_blocks


class ClusterView:
    """Owned by one scheduler, which alone applies events; everyone else only reads.

    A restarted scheduler starts empty: each worker joins again, its next report leaves a gap,
    and one full report later all is known.
    """

    def __init__(self, *, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._workers: dict[WorkerId, WorkerView] = {}
        self._index = PrefixIndex()
        self._requests_placed = 0

    @property
    def workers(self) -> Mapping[WorkerId, WorkerView]:
        """In the order in which they joined."""
        return MappingProxyType(self._workers)

    @property
    def requests_placed(self) -> int:
        """Also the turn by which ties rotate."""
        return self._requests_placed

    @property
    def index_blocks(self) -> int:
        """Distinct block names in the index."""
        return len(self._index)

    def pool(self, role: Role) -> list[WorkerView]:
        """Those that can be placed on: not stale."""
        return [worker for worker in self._workers.values() if worker.info.role == role and not worker.stale]

    def longest_prefix(self, granules: Sequence[BlockHash]) -> Mapping[WorkerId, int]:
        """Leading prompt tokens that each worker holds; absent where it is none."""
        return self._index.longest_prefix(granules)

    def apply(self, event: Event) -> None:
        """Fold one event in. What an unknown or buried worker says is ignored, not resurrected."""
        match event:
            case WorkerJoined():
                self._joined(event)
            case WorkerLeft(worker=worker, epoch=epoch):
                if self._is_current(worker, epoch):
                    self._remove(worker)
            case Reported(report=report, at=at):
                if self._is_current(report.worker, report.epoch):
                    self._reported(report, at)
            case RequestPlaced():
                self._request_placed(event)
            case TimePassed(at=at):
                self._time_passed(at)
            case _:
                assert_never(event)

    def check(self) -> None:
        """The index knows exactly the workers we know."""
        self._index.check()
        assert all(worker in self._index for worker in self._workers), "a worker is not in the index"
        assert self._index.members == len(self._workers), "the index knows a worker we don't"

    def _is_current(self, worker: WorkerId, epoch: int) -> bool:
        known = self._workers.get(worker)
        return known is not None and known.info.epoch == epoch

    def _joined(self, event: WorkerJoined) -> None:
        info = event.info
        known = self._workers.get(info.id)
        if known is not None and known.info.epoch >= info.epoch:
            return
        if known is not None:
            self._remove(info.id)
        self._index.add(info.id, info.layout.block_size)
        self._workers[info.id] = WorkerView(info=info, load=Load(blocks_free=info.blocks), heard=event.at)

    def _remove(self, worker: WorkerId) -> None:
        del self._workers[worker]
        self._index.drop(worker)

    def _reported(self, report: Report, at: float) -> None:
        worker = self._workers[report.worker]
        expected = 0 if worker.number is None else worker.number + 1
        if report.number < expected:
            return
        # A load is whole in itself; only cache events lean on the reports before them.
        needs_full = not report.full and (worker.needs_full or report.number > expected)
        self._workers[report.worker] = WorkerView(
            info=worker.info,
            load=report.load,
            counters=report.counters,
            heard=at,
            number=report.number,
            needs_full=needs_full,
        )
        if report.full:
            self._index.apply(report.worker, Cleared())
        if not needs_full:
            for event in report.events:
                self._index.apply(report.worker, event)

    def _request_placed(self, event: RequestPlaced) -> None:
        self._requests_placed += 1
        computes = self._workers[event.computes]
        self._workers[event.computes] = replace(computes, placed_tokens=computes.placed_tokens + event.tokens)
        decodes = self._workers[event.decodes]
        self._workers[event.decodes] = replace(
            decodes,
            placed_requests=decodes.placed_requests + 1,
            placed_blocks=decodes.placed_blocks + event.blocks,
        )

    def _time_passed(self, at: float) -> None:
        for id_, worker in self._workers.items():
            stale = at - worker.heard > self._stale_seconds
            if stale != worker.stale:
                self._workers[id_] = replace(worker, stale=stale)
