"""The real scheduler as a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cluster.scheduler.autoscaler import AutoscalePolicy, Bounds
from cluster.scheduler.costs import Policy as Prices
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from cluster.simulate.fleet import BUILD, MODEL
from diptych.types import SetWorkerRole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.scheduler.costs import RequestShape
    from cluster.simulate.constants import Constants
    from diptych.errors import ServingError
    from diptych.types import Outcome, Placement, Report, RequestId, Role, WorkerId, WorkerInfo

_STALE_SECONDS = 5.0


class Ours:
    """Adds nothing."""

    name: ClassVar[str] = "ours"

    def __init__(
        self,
        prices: Prices | None = None,
        *,
        max_running: int | None = None,
        queues: bool = True,
        autoscale: AutoscalePolicy | None = None,
    ) -> None:
        """Without queues every request is placed as it comes."""
        self._queues = queues
        spec = SchedulerSpec(
            model=MODEL,
            build=BUILD,
            policy=prices or Prices(),
            stale_seconds=_STALE_SECONDS,
            max_running=max_running,
            autoscale=autoscale,
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

    def rescale(self, now: float) -> Sequence[SetWorkerRole]:
        return [wanted for wanted in self.scheduler.rescale(now).operations if isinstance(wanted, SetWorkerRole)]

    def set_role(self, worker: WorkerId, epoch: int, role: Role) -> None:
        self.scheduler.set_role(worker, epoch, role)

    def spoke(self, request: RequestId, now: float) -> None:
        """Fronts don't tell."""

    def finished(self, outcome: Outcome, now: float) -> None:
        self.scheduler.finished(outcome, now)


def ours(constants: Constants) -> Ours:
    """As these constants have it. With a fixed number of workers: they don't come and go in a simulation."""
    told, slo = constants.autoscale, constants.slo
    if not told.enabled:
        return Ours(Prices(how=constants.how))
    workers = constants.workers.prefill + constants.workers.decode
    policy = AutoscalePolicy(
        **told.model_dump(exclude={"enabled"}),
        itl_seconds=slo.mean_itl_seconds,
        workers=Bounds(least=workers, most=workers),
    )
    return Ours(Prices(how=constants.how), max_running=constants.max_decode_batch, autoscale=policy)
