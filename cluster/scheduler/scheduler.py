"""The scheduler one can hold in a test: who is in the cluster and where a request runs.

Knows no Ray and no clock (callers say what time it is). Tokens and KV never pass here.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.scheduler.admission import CLASSES, Admission, AdmissionPolicy, ClassCounts, Turn, rank_of
from cluster.scheduler.autoscaler import AutoscalePolicy, Autoscaler
from cluster.scheduler.autoscaler import Decision as Rescaling
from cluster.scheduler.charges import Charges
from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.events import (
    Reported,
    RequestFinished,
    RoleChanged,
    TimePassed,
    WorkerDrains,
    WorkerJoined,
    WorkerLeft,
)
from cluster.scheduler.explain import kept
from cluster.scheduler.forecast import LearnedForecast
from cluster.scheduler.gate import NEVER, Gate
from cluster.scheduler.native_pricing import fastest_pricing
from cluster.scheduler.placement import Decision, place
from cluster.scheduler.pressure import pressure
from cluster.scheduler.records import RECORDS, Records
from cluster.scheduler.view import ClusterView, WorkerView
from diptych.errors import DeadlineExceeded, LayoutMismatch, NoWorker, ServingError
from diptych.types import (
    ClusterStatus,
    Explanation,
    ModelSource,
    Outcome,
    Placement,
    QueueStatus,
    Report,
    RequestId,
    Role,
    WorkerId,
    WorkerInfo,
    WorkerStatus,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_SOON_SECONDS = 0.001
"""`next_turn` is at least so far away: a clock that just misses it must not spin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSpec:
    """What a scheduler is told at birth; picklable."""

    model: ModelSource
    build: str
    """All its workers and fronts are of this one build."""
    policy: Policy
    stale_seconds: float
    """A worker silent for longer is not placed on until it reports again."""
    workerless_seconds: float = 60.0
    """How long requests wait for a worker to come back when none is left that could take them."""
    admission: AdmissionPolicy = field(default_factory=AdmissionPolicy)
    max_running: int | None = None
    """Sequences that a worker takes on; None when it has no limit."""
    report_seconds: float = 0.1
    """Between a busy worker's reports, until that was seen."""
    records: int = RECORDS
    """Requests whose decisions are kept."""
    autoscale: AutoscalePolicy | None = None
    """None: roles and workers stay as they are."""


class Scheduler:
    """One cluster's. `now` is monotonic seconds everywhere."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self._spec = spec
        fastest_pricing()  # compiled, if it must be, before anybody waits for it
        self._view = ClusterView(stale_seconds=spec.stale_seconds)
        self._forecast = LearnedForecast(self._view)
        self._gate = Gate(self._view, spec.policy.how, max_running=spec.max_running, report_seconds=spec.report_seconds)
        self._admission = Admission(spec.admission)
        self._charges = Charges(self._admission)
        self._records = Records(spec.records)
        self._autoscaler = Autoscaler(spec.autoscale) if spec.autoscale else None
        self._placed_seconds = 0.0
        """Work of all prompts placed, as predicted."""
        self._without_workers: float | None = None
        """Since when nobody can be placed though somebody waits."""

    # ---- workers ------------------------------------------------------------------------------------------

    def join(self, info: WorkerInfo, now: float) -> None:
        """Raises LayoutMismatch when the worker can't exchange KV with this cluster."""
        for mismatch in self._mismatches(info):
            raise LayoutMismatch(mismatch)
        before = self._view.workers.get(info.id)
        self._view.apply(WorkerJoined(info=info, at=now))
        if self._view.workers[info.id] is not before:
            self._gate.joined(self._view.workers[info.id])

    def leave(self, worker: WorkerId, epoch: int) -> None:
        """That incarnation is gone; a later one of the same name is not touched."""
        self._view.apply(WorkerLeft(worker=worker, epoch=epoch))

    def drain(self, worker: WorkerId, epoch: int) -> None:
        """It gets nothing new; prefixes are still fetched from its cache."""
        self._view.apply(WorkerDrains(worker=worker, epoch=epoch))

    def set_role(self, worker: WorkerId, epoch: int, role: Role) -> None:
        """What it gets from now on."""
        self._view.apply(RoleChanged(worker=worker, epoch=epoch, role=role))

    def report(self, report: Report, now: float) -> bool:
        """Whether the worker's next report has to be a full one."""
        before = self._view.workers.get(report.worker)
        if before is not None and before.info.epoch == report.epoch:
            self._gate.reported(before, report.load, now)
        self._view.apply(Reported(report=report, at=now))
        worker = self._view.workers.get(report.worker)
        return worker is not None and worker.info.epoch == report.epoch and worker.needs_full

    # ---- requests -----------------------------------------------------------------------------------------

    def submit(self, shape: RequestShape, now: float) -> Placement | None:
        """Its placement, or None: it waits, and `advance` will tell.

        Raises Overloaded when it would wait in vain, NoWorker or PromptTooLong when nobody can take it.
        """
        with self._recording(shape, now):
            return self._submit(shape, now)

    def _submit(self, shape: RequestShape, now: float) -> Placement | None:
        self._view.apply(TimePassed(at=now))
        if self._admission.goes_first(shape):
            rank = rank_of(shape.priority)
            if (decision := self._open(shape, rank, now)) is not None:
                self._admission.pass_by(shape, self._forecast.prefill_seconds(shape))
                return self._placed(decision, shape, rank, now)
        seconds = self._forecast.prefill_seconds(shape)
        self._admission.add(shape, seconds, now, assumed=self._assumed_rate, ahead=self._gate.typical_bound_seconds)
        turn = self._admission.next(now)
        if turn is None or turn.waiting.shape.request != shape.request:
            return None
        try:
            return self._take(turn, now)
        except ServingError:
            self._admission.withdraw(shape.request)
            raise

    def advance(self, now: float) -> list[tuple[RequestId, Placement | ServingError]]:
        """Whose turn came, in order, and who leaves without: to be asked for after each report and at `next_turn`."""
        gone: list[tuple[RequestId, Placement | ServingError]] = [
            (waiting.shape.request, _too_late(waiting.shape)) for waiting in self._admission.expire(now)
        ]
        if self._admission:
            self._view.apply(TimePassed(at=now))
        while (turn := self._admission.next(now)) is not None:
            request = turn.waiting.shape.request
            try:
                placement = self._take(turn, now)
            except NoWorker as error:
                if self._may_come_back(now):
                    break
                placement = error
            except ServingError as error:
                placement = error
            if placement is None:
                break
            self._admission.withdraw(request)
            gone.append((request, placement))
        for request, placement in gone:
            if isinstance(placement, ServingError):
                self._records.refused(request, placement, now)
        return gone

    def next_turn(self, now: float) -> float | None:
        """When `advance` has something to tell without any news; None when there is no such time."""
        times: list[float] = []
        if (deadline := self._admission.next_deadline) is not None:
            times.append(deadline)
        if (turn := self._admission.next(now)) is not None:
            if self._without_workers is not None:
                times.append(self._without_workers + self._spec.workerless_seconds)
            elif (wait := self._gate.wait_seconds(turn.waiting.shape, rank_of(turn.priority), now)) < NEVER:
                times.append(now + wait)
        return max(now + _SOON_SECONDS, min(times)) if times else None

    def withdraw(self, request: RequestId, now: float) -> None:
        """Nobody wants it any more: it waits no longer, if it did."""
        self._admission.withdraw(request)

    def finished(self, outcome: Outcome, now: float) -> None:
        """A front's last word of a request that was asked for."""
        self._charges.settle(outcome)
        self._gate.finished(outcome.request)
        self._records.finished(outcome, now)
        self._view.apply(RequestFinished(outcome=outcome))

    def place(self, shape: RequestShape, now: float) -> Placement:
        """Now, whoever waits. Raises NoWorker or PromptTooLong. Counts against the workers until they next report."""
        with self._recording(shape, now):
            self._view.apply(TimePassed(at=now))
            return self._placed(place(self._view, shape, self._spec.policy, now), shape, rank_of(shape.priority), now)

    # ---- roles ------------------------------------------------------------------------------------------

    def rescale(self, now: float) -> Rescaling:
        """What its owner is to change now; nothing where nobody autoscales."""
        if self._autoscaler is None:
            return Rescaling()
        self._view.apply(TimePassed(at=now))
        queued = self._admission.queued_seconds
        return self._autoscaler.decide(
            pressure(
                self._view,
                now,
                asked_seconds=self._placed_seconds + queued,
                queued_seconds=queued,
                ttft_seconds=self._spec.admission.ttft_seconds,
                itl_seconds=self._autoscaler.policy.itl_seconds,
                max_running=self._spec.max_running,
            )
        )

    # ---- seen ---------------------------------------------------------------------------------------------

    def explain(self, request: str, now: float) -> tuple[Explanation, ...]:
        """Each choice's record, by our id or by its caller's. Raises UnknownRequest."""
        return self._records.explain(request, now)

    def status(self, now: float) -> ClusterStatus:
        """All that is known of every worker that joined and didn't leave, and of those who wait."""
        self._view.apply(TimePassed(at=now))
        return ClusterStatus(
            model=self._spec.model.name,
            build=self._spec.build,
            workers=tuple(_status(worker, now) for worker in self._view.workers.values()),
            requests_placed=self._view.requests_placed,
            index_blocks=self._view.index_blocks,
            accuracy=self._records.accuracy,
            queues=tuple(map(_queue_status, CLASSES, self._admission.counts(now))),
            autoscale=self._autoscaler.status if self._autoscaler else None,
        )

    def check(self) -> None:
        """The view and the queues state their own truth."""
        self._view.check()
        self._admission.check()

    # ---- inside -------------------------------------------------------------------------------------------

    @contextmanager
    def _recording(self, shape: RequestShape, now: float) -> Generator[None]:
        self._records.asked(shape, now)
        try:
            yield
        except ServingError as error:
            self._records.refused(shape.request, error, now)
            raise

    @property
    def _assumed_rate(self) -> float:
        """Seconds of work that all who compute prompts do in a second."""
        return float(max(1, sum(worker.info.role != "decode" for worker in self._view.workers.values())))

    def _take(self, turn: Turn, now: float) -> Placement | None:
        """None when there is no room yet. Raises as `place` does."""
        waiting, rank = turn.waiting, rank_of(turn.priority)
        decision = self._open(waiting.shape, rank, now)
        if decision is None:
            return None
        self._admission.release(waiting, now)
        placement = self._placed(decision, waiting.shape, rank, now)
        return placement if turn.priority == waiting.shape.priority else replace(placement, priority=turn.priority)

    def _open(self, shape: RequestShape, rank: int, now: float) -> Decision | None:
        """Where it goes, if there is room."""
        if self._gate.wait_seconds(shape, rank, now) <= 0:
            return place(self._view, shape, self._spec.policy, now, rank)
        if not self._gate.may_go_elsewhere(shape, rank, now):
            return None
        decision = place(self._view, shape, self._spec.policy, now, rank)
        return decision if self._gate.is_open_at(decision.placed.computes, rank, now) else None

    def _placed(self, decision: Decision, shape: RequestShape, rank: int, now: float) -> Placement:
        placed, self._without_workers = decision.placed, None
        self._placed_seconds += placed.seconds
        self._gate.placed(placed)
        self._charges.placed(shape, placed.seconds, self._forecast.token_seconds())
        self._view.apply(placed)
        self._records.placed(shape, decision.placement, now, kept(decision.considered))
        return decision.placement

    def _may_come_back(self, now: float) -> bool:
        """A worker that died comes back within seconds."""
        if self._without_workers is None:
            self._without_workers = now
        return now - self._without_workers < self._spec.workerless_seconds

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
            if other.info.id != info.id and other.info.layout.of_model != info.layout.of_model:
                yield f"KV can't pass between {info.id} with {info.layout} and {other.info.id} with {other.info.layout}"


def _too_late(shape: RequestShape) -> DeadlineExceeded:
    return DeadlineExceeded(f"the deadline passed while {shape.request} waited: {shape.deadline_seconds:g} s")


def _queue_status(name: str, counts: ClassCounts) -> QueueStatus:
    return QueueStatus(
        name=name,
        length=counts.length,
        oldest_seconds=counts.oldest_seconds,
        released=counts.released,
        waited_seconds=counts.waited_seconds,
        rejected=tuple(counts.rejected.items()),
    )


def _status(worker: WorkerView, now: float) -> WorkerStatus:
    return WorkerStatus(
        info=worker.info,
        load=worker.load,
        counters=worker.counters,
        alive=not worker.stale,
        report_age_seconds=now - worker.heard,
    )
