"""The scheduler as a front calls it: it may wait long, hang, die and be replaced. Knows handles; decides nothing.

`place` is answered when it is the request's turn, which may take long: silence is no sign of death, so
the scheduler is asked whether the request waits there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from diptych.errors import NoWorker, ServingError, WorkerLost
from workers.actors import answer

if TYPE_CHECKING:
    from cluster.scheduler.costs import RequestShape
    from diptych.types import ClusterStatus, Explanation, Outcome, Placement, RequestId

T = TypeVar("T")
SILENT_SECONDS = 2.0
"""A scheduler that says nothing for so long isn't waited for: its successor is up in seconds."""


class SchedulerSilent(NoWorker):
    """No scheduler answers."""


class SchedulerCalls:
    """cluster.front.dispatcher.SchedulerPort over a handle that may be replaced while calls wait."""

    def __init__(self, handle: Any, timeout_seconds: float, *, silent_seconds: float = SILENT_SECONDS) -> None:  # noqa: ANN401
        """`timeout_seconds` bounds calls that are answered at once."""
        self._handle = handle
        self._timeout_seconds = timeout_seconds
        self._silent_seconds = silent_seconds
        self._replaced = asyncio.Event()

    def replace(self, handle: Any) -> None:  # noqa: ANN401
        """Calls under way are made again."""
        self._handle = handle
        self._replaced.set()
        self._replaced = asyncio.Event()

    async def place(self, shape: RequestShape) -> Placement:
        """When it is its turn. Raises SchedulerSilent, and what the scheduler raises."""
        while True:
            replaced, handle = self._replaced, self._handle
            asked = asyncio.ensure_future(answer(handle.place.remote(shape), "the scheduler"))
            try:
                while not await self._is_over(asked, replaced):
                    await self._check_waiting(asked, handle, shape.request)
                if replaced.is_set() and not asked.done():
                    continue
                with suppress(WorkerLost):
                    placement = asked.result()
                    assert placement is not None, "who asks has not withdrawn"
                    return placement
                if not await self._is_over(None, replaced):
                    raise self._silent()
            finally:
                asked.cancel()

    async def withdraw(self, request: RequestId) -> None:
        """Nobody wants it any more."""
        with suppress(ServingError, TimeoutError):
            async with asyncio.timeout(self._silent_seconds):
                await answer(self._handle.withdraw.remote(request), "the scheduler")

    async def status(self) -> ClusterStatus:
        """The cluster. Raises NoWorker when no scheduler answers."""
        return await self._ask(lambda handle: handle.status.remote())

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        """The records of its decisions. Raises UnknownRequest, or NoWorker when no scheduler answers."""
        return await self._ask(lambda handle: handle.explain.remote(request))

    async def finished(self, outcomes: tuple[Outcome, ...]) -> None:
        """Once: a scheduler that dies meanwhile takes its statistics with it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_seconds):
                await answer(self._handle.finished.remote(outcomes), "the scheduler")

    async def _is_over(self, asked: asyncio.Future[Any] | None, replaced: asyncio.Event) -> bool:
        """Whether there is an answer, or another one to ask, within the time that a scheduler may be silent."""
        waiting = asyncio.ensure_future(replaced.wait())
        awaited = {waiting, asked} if asked else {waiting}
        try:
            done, _ = await asyncio.wait(awaited, timeout=self._silent_seconds, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            waiting.cancel()

    async def _check_waiting(self, asked: asyncio.Future[Any], handle: Any, request: RequestId) -> None:  # noqa: ANN401
        """Raises SchedulerSilent unless the scheduler says that it will answer, or has just answered."""
        try:
            async with asyncio.timeout(self._silent_seconds):
                if await answer(handle.is_waiting.remote(request), "the scheduler"):
                    return
                # Its answer is on its way.
                await asyncio.wait({asked})
        except WorkerLost:
            return  # the call itself fails too, and says so
        except TimeoutError:
            if not asked.done():
                raise self._silent() from None

    async def _ask(self, call: Callable[[Any], Awaitable[T]]) -> T:
        """Asking twice does no harm."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    replaced = asyncio.ensure_future(self._replaced.wait())
                    asked = asyncio.ensure_future(answer(call(self._handle), "the scheduler"))
                    try:
                        await asyncio.wait({asked, replaced}, return_when=asyncio.FIRST_COMPLETED)
                        if not asked.done():
                            continue
                        with suppress(WorkerLost):
                            return asked.result()
                        await replaced
                    finally:
                        asked.cancel()
                        replaced.cancel()
        except TimeoutError:
            raise NoWorker(f"the scheduler did not answer for {self._timeout_seconds:g} s: try again") from None

    def _silent(self) -> SchedulerSilent:
        return SchedulerSilent(f"the scheduler did not answer for {self._silent_seconds:g} s: try again")
