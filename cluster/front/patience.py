"""Bounds many short waits with one timer: asyncio.timeout makes and cancels one for each. Knows no wait's purpose."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

T = TypeVar("T")


class Patience:
    """Shared by all who wait on one event loop. A task waits for one thing at a time."""

    def __init__(self) -> None:
        self._ends: dict[asyncio.Task[object], float] = {}
        self._late: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, what: Awaitable[T], seconds: float) -> T:
        """What `what` returns; cancelled, and TimeoutError raised, when it takes longer."""
        task = asyncio.current_task()
        assert task is not None, "only a task can be cancelled"
        self._begin(task, seconds)
        try:
            return await what
        except asyncio.CancelledError as error:
            # Somebody else may have cancelled it too, and that is the stronger word.
            if task in self._late and task.uncancel() == 0:
                raise TimeoutError from error
            raise
        finally:
            del self._ends[task]
            self._late.discard(task)

    def _begin(self, task: asyncio.Task[object], seconds: float) -> None:
        loop = task.get_loop()
        end = self._ends[task] = loop.time() + seconds
        if self._timer is None or end < self._timer.when():
            self._arm(loop, end)

    def _arm(self, loop: asyncio.AbstractEventLoop, end: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(end, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends the waits that are over. With none left, the next one arms the timer again."""
        self._timer, now = None, loop.time()
        for task in [task for task, end in self._ends.items() if end <= now and task not in self._late]:
            self._late.add(task)
            task.cancel()
        if waiting := [end for task, end in self._ends.items() if task not in self._late]:
            self._arm(loop, min(waiting))
