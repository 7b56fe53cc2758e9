"""Tokens on their way to fronts: one stream per front, one tuple per engine step.

Lives on the event loop. Never waits for a reader; what a front doesn't read is bounded by the
max_tokens of its requests, and a front that leaves is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from diptych.types import FrontId, Outgoing


@dataclass(slots=True, eq=False)
class _Reader:
    waiting: list[Outgoing] = field(default_factory=list[Outgoing])
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def close(self) -> None:
        """It ends after what it has."""
        self.closed = True
        self.wake.set()


class Outbox:
    """`on_left` is called when a front stops reading."""

    def __init__(self, on_left: Callable[[FrontId], None]) -> None:
        self._readers: dict[FrontId, _Reader] = {}
        self._on_left = on_left
        self._closed = False
        self._empty = asyncio.Event()

    def put(self, step: Mapping[FrontId, list[Outgoing]]) -> None:
        """What one step has for each front."""
        for front, items in step.items():
            if reader := self._readers.get(front):  # nobody reads for a front that left
                reader.waiting += items
                reader.wake.set()

    async def read(self, front: FrontId) -> AsyncGenerator[tuple[Outgoing, ...], None]:
        """Everything for this front, as it comes, until it leaves or the worker closes.

        Whoever read under this name before has left: its requests were another process's.
        """
        if before := self._readers.get(front):
            before.close()
            self._on_left(front)
        reader = self._readers[front] = _Reader(closed=self._closed)
        try:
            yield ()  # open: what is submitted from now on will be heard
            while True:
                items, reader.waiting = reader.waiting, []
                if items:
                    yield tuple(items)
                elif reader.closed:
                    break
                else:
                    reader.wake.clear()
                    await reader.wake.wait()
        finally:
            self._left(front, reader)

    def close(self) -> None:
        """Readers end after what they have."""
        self._closed = True
        for reader in self._readers.values():
            reader.close()
        self._note_empty()

    def forget(self, front: FrontId) -> None:
        """It will not read any more. Its process may have died without ending its stream: Ray doesn't."""
        if reader := self._readers.pop(front, None):
            reader.close()
            self._note_empty()

    async def wait_empty(self) -> None:
        """After `close`: until every reader has all it was sent."""
        await self._empty.wait()

    def _left(self, front: FrontId, reader: _Reader) -> None:
        if self._readers.get(front) is reader:
            del self._readers[front]
            self._on_left(front)
        self._note_empty()

    def _note_empty(self) -> None:
        if self._closed and not self._readers:
            self._empty.set()
