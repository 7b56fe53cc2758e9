"""Tokens on their way to fronts: one stream per front, one tuple per engine step.

Lives on the event loop. Never waits for a reader; what a front doesn't read is bounded by the
max_tokens of its requests, and a front that leaves is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping

from diptych.types import FrontId, Outgoing


class Outbox:
    """`on_left` is called when a front stops reading."""

    def __init__(self, on_left: Callable[[FrontId], None]) -> None:
        self._waiting: dict[FrontId, list[Outgoing]] = {}
        self._wake: dict[FrontId, asyncio.Event] = {}
        self._on_left = on_left
        self._closed = False

    def put(self, step: Mapping[FrontId, list[Outgoing]]) -> None:
        """What one step has for each front."""
        for front, items in step.items():
            if front in self._wake:  # nobody reads for a front that left
                self._waiting[front] += items
                self._wake[front].set()

    async def read(self, front: FrontId) -> AsyncGenerator[tuple[Outgoing, ...], None]:
        """Everything for this front, as it comes, until it leaves or the worker closes."""
        wake = self._wake[front] = asyncio.Event()
        self._waiting[front] = []
        try:
            yield ()  # open: what is submitted from now on will be heard
            while not self._closed:
                await wake.wait()
                wake.clear()
                items, self._waiting[front] = self._waiting[front], []
                if items:
                    yield tuple(items)
        finally:
            if self._wake.get(front) is wake:
                del self._wake[front], self._waiting[front]
                self._on_left(front)

    def close(self) -> None:
        """Readers end after what they have."""
        self._closed = True
        for wake in self._wake.values():
            wake.set()
