"""The real scheduler as a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cluster.scheduler.costs import Policy as Prices
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from cluster.simulate.fleet import BUILD, MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.scheduler.costs import RequestShape
    from diptych.errors import ServingError
    from diptych.types import Outcome, Placement, Report, RequestId, WorkerId, WorkerInfo

_STALE_SECONDS = 5.0


class Ours:
    """Adds nothing."""

    name: ClassVar[str] = "ours"

    def __init__(self, prices: Prices | None = None, *, max_running: int | None = None, queues: bool = True) -> None:
        """Without queues every request is placed as it comes."""
        self._queues = queues
        spec = SchedulerSpec(
            model=MODEL,
            build=BUILD,
            policy=prices or Prices(),
            stale_seconds=_STALE_SECONDS,
            max_running=max_running,
        )
        self.scheduler = Scheduler(spec)

    @property
    def weights(self) -> str:
        return ""

    def join(self, info: WorkerInfo, now: float) -> None:
        self.scheduler.join(info, now)

    def leave(self, worker: WorkerId, epoch: int, now: float) -> None:
        del now
        self.scheduler.leave(worker, epoch)

    def report(self, report: Report, now: float) -> bool:
        return self.scheduler.report(report, now)

    def submit(self, shape: RequestShape, now: float) -> Placement | None:
        return self.scheduler.submit(shape, now) if self._queues else self.scheduler.place(shape, now)

    def advance(self, now: float) -> Sequence[tuple[RequestId, Placement | ServingError]]:
        return self.scheduler.advance(now)

    def next_turn(self, now: float) -> float | None:
        return self.scheduler.next_turn(now)

    def spoke(self, request: RequestId, now: float) -> None:
        """Fronts don't tell."""

    def finished(self, outcome: Outcome, now: float) -> None:
        self.scheduler.finished(outcome, now)
