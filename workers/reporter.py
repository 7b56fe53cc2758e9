"""A worker's reports to the scheduler: numbered, in order, one at a time. Knows no engine.

While one is on its way the next changes are folded into one. When the scheduler can't be reached
or asks for it, the next report is a full one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from diptych.errors import ServingError
from diptych.types import Report, WorkerId

if TYPE_CHECKING:
    from workers.engine_thread import Snapshot

_TIMEOUT_SECONDS = 5.0


class Reporter:
    """Lives on the event loop. `request_full` makes the engine's next snapshot a full one."""

    def __init__(self, worker: WorkerId, epoch: int, request_full: Callable[[], None]) -> None:
        self._worker = worker
        self._epoch = epoch
        self._request_full = request_full
        self._number = 0
        self._pending: Snapshot | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def report_to(self, report: Callable[[Report], Awaitable[bool]]) -> None:
        """From now on. `report` answers whether it needs a full one next."""
        self.close()
        self._request_full()
        self._task = asyncio.ensure_future(self._run(report))

    def add(self, snapshot: Snapshot) -> None:
        """The engine's news."""
        self._pending = snapshot if self._pending is None else snapshot.after(self._pending)
        self._wake.set()

    def close(self) -> None:
        if self._task:
            self._task.cancel()

    async def _run(self, report: Callable[[Report], Awaitable[bool]]) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            news, self._pending = self._pending, None
            if news is None:
                continue
            if await self._wants_full(report, self._numbered(news)):
                self._request_full()

    async def _wants_full(self, report: Callable[[Report], Awaitable[bool]], news: Report) -> bool:
        try:
            return await asyncio.wait_for(report(news), _TIMEOUT_SECONDS)
        except (TimeoutError, ServingError):
            return True  # whether it arrived or not: what it told is told again

    def _numbered(self, news: Snapshot) -> Report:
        number, self._number = self._number, self._number + 1
        return Report(
            worker=self._worker,
            epoch=self._epoch,
            number=number,
            load=news.load,
            counters=news.counters,
            events=news.events,
            full=news.full,
            steps=news.steps,
            transfers=news.transfers,
        )
