"""The scheduler as an actor: adds the clock, and calls that wait for their turn. Wrapped by who creates it.

Its methods touch the scheduler without awaiting, so calls don't interleave and it needs no lock. A
request that waits holds a call open: their number is bounded by the queues (`admission.queue`), far
below the actor's concurrency, so reports always come through.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.scheduler.scheduler import Scheduler, SchedulerSpec

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from cluster.scheduler.autoscaler import Decision as Rescaling
    from cluster.scheduler.costs import RequestShape
    from diptych.errors import ServingError
    from diptych.types import (
        ClusterStatus,
        Explanation,
        Outcome,
        Placement,
        Report,
        RequestId,
        Role,
        WorkerId,
        WorkerInfo,
    )


class SchedulerActor:
    """One per cluster."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self._scheduler = Scheduler(spec)
        self._waiting: dict[RequestId, asyncio.Future[Placement | None]] = {}
        self._turn: asyncio.TimerHandle | None = None
        self._decision_cpu_seconds = 0.0
        self._away: tuple[tuple[WorkerId, str], ...] = ()

    async def join(self, info: WorkerInfo) -> None:
        """Raises LayoutMismatch."""
        self._scheduler.join(info, time.monotonic())

    async def leave(self, worker: WorkerId, epoch: int) -> None:
        """That incarnation of the worker is gone."""
        self._scheduler.leave(worker, epoch)

    async def drain(self, worker: WorkerId, epoch: int) -> None:
        """It gets nothing new."""
        self._scheduler.drain(worker, epoch)

    async def away(self, workers: Mapping[WorkerId, str]) -> None:
        """These should be there and are not, and why: for whoever asks how the cluster is."""
        self._away = tuple(workers.items())

    async def set_role(self, worker: WorkerId, epoch: int, role: Role) -> None:
        """What it gets from now on."""
        self._scheduler.set_role(worker, epoch, role)

    async def rescale(self) -> Rescaling:
        """What the owner of the workers is to change; to be asked at each interval."""
        return self._scheduler.rescale(time.monotonic())

    async def report(self, report: Report) -> bool:
        """Whether the worker's next report has to be a full one."""
        needs_full = self._scheduler.report(report, time.monotonic())
        if self._waiting:
            self._advance()
        return needs_full

    async def place(self, shape: RequestShape) -> Placement | None:
        """Returns when it is its turn; None when it was withdrawn.

        Raises Overloaded, NoWorker, PromptTooLong or DeadlineExceeded.
        """
        with self._deciding():
            placement = self._scheduler.submit(shape, time.monotonic())
        if placement is not None:
            return placement
        turn = self._waiting[shape.request] = asyncio.get_running_loop().create_future()
        self._wait_turn()
        try:
            return await turn
        finally:
            del self._waiting[shape.request]
            self._scheduler.withdraw(shape.request, time.monotonic())

    async def is_waiting(self, request: RequestId) -> bool:
        """Whether `place` will answer: nobody has to guess from its silence."""
        return request in self._waiting

    async def withdraw(self, request: RequestId) -> None:
        """Nobody wants it any more; its call of `place` ends. Idempotent."""
        self._scheduler.withdraw(request, time.monotonic())
        if turn := self._waiting.get(request):
            _tell(turn, None)
            self._wait_turn()

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
        return replace(status, decision_cpu_seconds=self._decision_cpu_seconds, away=self._away)

    @contextmanager
    def _deciding(self) -> Generator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self._decision_cpu_seconds += time.thread_time() - began

    def _advance(self) -> None:
        with self._deciding():
            gone = self._scheduler.advance(time.monotonic())
        for request, placement in gone:
            _tell(self._waiting[request], placement)
        self._wait_turn()

    def _wait_turn(self) -> None:
        """One timer, for the next turn that comes without news."""
        if self._turn:
            self._turn.cancel()
        now = time.monotonic()
        at = self._scheduler.next_turn(now) if self._waiting else None
        self._turn = None if at is None else asyncio.get_running_loop().call_later(at - now, self._advance)


def _tell(turn: asyncio.Future[Placement | None], placement: Placement | ServingError | None) -> None:
    if turn.done():
        return  # withdrawn in the same moment
    if isinstance(placement, Exception):
        turn.set_exception(placement)
    else:
        turn.set_result(placement)
