"""The scheduler as an actor: adds the clock and nothing else. Wrapped with `ray.remote` by who creates it.

Its methods touch the scheduler without awaiting, so calls don't interleave and it needs no lock.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from cluster.scheduler.scheduler import Scheduler, SchedulerSpec

if TYPE_CHECKING:
    from cluster.scheduler.costs import RequestShape
    from diptych.types import ClusterStatus, Placement, Report, WorkerId, WorkerInfo


class SchedulerActor:
    """One per cluster."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self._scheduler = Scheduler(spec)

    async def join(self, info: WorkerInfo) -> None:
        """Raises LayoutMismatch."""
        self._scheduler.join(info, time.monotonic())

    async def leave(self, worker: WorkerId, epoch: int) -> None:
        """That incarnation of the worker is gone."""
        self._scheduler.leave(worker, epoch)

    async def report(self, report: Report) -> bool:
        """Whether the worker's next report has to be a full one."""
        return self._scheduler.report(report, time.monotonic())

    async def place(self, shape: RequestShape) -> Placement:
        """Raises NoWorker or PromptTooLong."""
        return self._scheduler.place(shape, time.monotonic())

    async def wait_dead(self) -> None:
        """Never returns: the call fails when the process dies."""
        await asyncio.Event().wait()

    async def status(self) -> ClusterStatus:
        """The cluster as of now."""
        return self._scheduler.status(time.monotonic())
