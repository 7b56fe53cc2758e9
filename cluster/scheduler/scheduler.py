"""The scheduler one can hold in a test: who is in the cluster and where a request runs.

Knows no Ray and no clock (callers say what time it is). Tokens and KV never pass here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.placement import place
from cluster.scheduler.view import ClusterView, Reported, TimePassed, WorkerJoined, WorkerLeft, WorkerView
from diptych.errors import LayoutMismatch
from diptych.types import ClusterStatus, KvLayout, ModelSource, Placement, Report, WorkerId, WorkerInfo, WorkerStatus

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSpec:
    """What a scheduler is told at birth; picklable."""

    model: ModelSource
    build: str
    """All its workers and fronts are of this one build."""
    policy: Policy
    stale_seconds: float
    """A worker silent for longer is not placed on until it reports again."""


class Scheduler:
    """One cluster's. `now` is monotonic seconds everywhere."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self._spec = spec
        self._view = ClusterView(stale_seconds=spec.stale_seconds)

    def join(self, info: WorkerInfo, now: float) -> None:
        """Raises LayoutMismatch when the worker can't exchange KV with this cluster."""
        for mismatch in self._mismatches(info):
            raise LayoutMismatch(mismatch)
        self._view.apply(WorkerJoined(info=info, at=now))

    def leave(self, worker: WorkerId, epoch: int) -> None:
        """That incarnation is gone; a later one of the same name is not touched."""
        self._view.apply(WorkerLeft(worker=worker, epoch=epoch))

    def report(self, report: Report, now: float) -> bool:
        """Whether the worker's next report has to be a full one."""
        self._view.apply(Reported(report=report, at=now))
        worker = self._view.workers.get(report.worker)
        return worker is not None and worker.info.epoch == report.epoch and worker.needs_full

    def place(self, shape: RequestShape, now: float) -> Placement:
        """Raises NoWorker or PromptTooLong. Counts against the workers until they next report."""
        self._view.apply(TimePassed(at=now))
        decision = place(self._view, shape, self._spec.policy)
        self._view.apply(decision.placed)
        return decision.placement

    def status(self, now: float) -> ClusterStatus:
        """All that is known of every worker that joined and didn't leave."""
        self._view.apply(TimePassed(at=now))
        return ClusterStatus(
            model=self._spec.model.name,
            build=self._spec.build,
            workers=tuple(_status(worker, now) for worker in self._view.workers.values()),
            requests_placed=self._view.requests_placed,
            index_blocks=self._view.index_blocks,
        )

    def check(self) -> None:
        """The view states its own truth."""
        self._view.check()

    def _mismatches(self, info: WorkerInfo) -> Iterator[str]:
        spec = self._spec
        if info.build != spec.build:
            yield f"{info.id} is build {info.build}, this cluster is build {spec.build}: start both from one build"
        if info.model_digest != spec.model.digest:
            yield (
                f"{info.id} serves the model with digest {info.model_digest}, this cluster serves {spec.model.name} "
                f"with digest {spec.model.digest}: start both with one model.name"
            )
        for other in self._view.workers.values():
            if other.info.id != info.id and _model(other.info.layout) != _model(info.layout):
                yield f"KV can't pass between {info.id} with {info.layout} and {other.info.id} with {other.info.layout}"


def _model(layout: KvLayout) -> tuple[int, int, int]:
    """Block sizes, numbers and shards can be bridged; this can't."""
    return layout.layers, layout.kv_heads, layout.head_dim


def _status(worker: WorkerView, now: float) -> WorkerStatus:
    return WorkerStatus(
        info=worker.info,
        load=worker.load,
        counters=worker.counters,
        alive=not worker.stale,
        report_age_seconds=now - worker.heard,
    )
