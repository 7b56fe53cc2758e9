"""Hears what fronts log, for as long as each lives. Knows no front but by its handle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cluster.journal import Entry
from diptych.errors import ServingError
from workers.actors import answer


class Listeners:
    """Of one cluster."""

    def __init__(self, add: Callable[[Entry], None]) -> None:
        self._add = add
        self._tasks: set[asyncio.Task[None]] = set()

    def hear(self, handle: Any) -> None:  # noqa: ANN401 (handles are untyped)
        """From now on, until it is closed or dies."""
        task = asyncio.ensure_future(self._hear(handle))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_last_words(self, seconds: float) -> None:
        """Of fronts that are being closed."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def _hear(self, handle: Any) -> None:  # noqa: ANN401
        with suppress(ServingError):
            async for entries in handle.log.remote():
                for entry in await answer(entries, "a front"):
                    self._add(entry)
