"""The scheduler as an actor: adds the clock and nothing else. Wrapped with `ray.remote` by who creates it.

Its methods touch the scheduler without awaiting, so calls don't interleave and it needs no lock.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.scheduler.scheduler import Scheduler, SchedulerSpec

if TYPE_CHECKING:
    from cluster.scheduler.costs import RequestShape
    from diptych.types import ClusterStatus, Explanation, Outcome, Placement, Report, Role, WorkerId, WorkerInfo


class SchedulerActor:
    """One per cluster."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self._scheduler = Scheduler(spec)
        self._decision_cpu_seconds = 0.0

    async def join(self, info: WorkerInfo) -> None:
        """Raises LayoutMismatch."""
        self._scheduler.join(info, time.monotonic())

    async def leave(self, worker: WorkerId, epoch: int) -> None:
        """That incarnation of the worker is gone."""
        self._scheduler.leave(worker, epoch)

    async def drain(self, worker: WorkerId, epoch: int) -> None:
        """It gets nothing new."""
        self._scheduler.drain(worker, epoch)

    async def set_role(self, worker: WorkerId, epoch: int, role: Role) -> None:
        """What it gets from now on."""
        self._scheduler.set_role(worker, epoch, role)

    async def report(self, report: Report) -> bool:
        """Whether the worker's next report has to be a full one."""
        return self._scheduler.report(report, time.monotonic())

    async def place(self, shape: RequestShape) -> Placement:
        """Raises NoWorker or PromptTooLong."""
        began = time.thread_time()
        try:
            return self._scheduler.place(shape, time.monotonic())
        finally:
            self._decision_cpu_seconds += time.thread_time() - began

    async def finished(self, outcomes: tuple[Outcome, ...]) -> None:
        """How answers went that a front had placed."""
        now = time.monotonic()
        for outcome in outcomes:
            self._scheduler.finished(outcome, now)

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        """Raises UnknownRequest."""
        return self._scheduler.explain(request, time.monotonic())

    async def wait_dead(self) -> None:
        """Never returns: the call fails when the process dies."""
        await asyncio.Event().wait()

    async def status(self) -> ClusterStatus:
        """The cluster as of now."""
        status = self._scheduler.status(time.monotonic())
        return replace(status, decision_cpu_seconds=self._decision_cpu_seconds)
