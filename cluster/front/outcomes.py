"""How answers went, on their way to the scheduler: a few at a time. Knows no worker and no client.

They are statistics: nobody waits for them, and those that a dying scheduler misses are lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from diptych.errors import ServingError
from diptych.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diptych.types import Emission, RequestId, Served

_GATHER_SECONDS: Final = 0.1
"""Each batch is a message between processes."""
_BATCH: Final = 64
_KEPT: Final = 4096
"""While the scheduler does not take any: older ones are dropped."""


class Hearer(Protocol):
    """Who learns from outcomes."""

    async def finished(self, outcomes: tuple[Outcome, ...]) -> None: ...


class Watch:
    """Of one request: when it was asked for, placed, first heard and last heard."""

    def __init__(self, request: RequestId) -> None:
        self._request = request
        self._asked = time.monotonic()
        self._placed: float | None = None
        self._first: float | None = None
        self._last = 0.0
        self._tokens = 0
        self._served: Served | None = None

    def placed(self) -> None:
        """It is known where it runs. Again after an attempt that said nothing: the last one counts."""
        if self._first is None:
            self._placed = time.monotonic()

    def heard(self, emissions: Sequence[Emission]) -> None:
        """The next tokens, if any."""
        if not emissions:
            return
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last
        self._tokens += len(emissions)
        for emission in emissions:
            self._served = emission.served or self._served

    def outcome(self, error: str = "") -> Outcome:
        """It is over."""
        placed = self._placed if self._placed is not None else time.monotonic()
        first = self._first
        return Outcome(
            request=self._request,
            queue_seconds=placed - self._asked,
            ttft_seconds=None if first is None else first - placed,
            itl_seconds=None if first is None or self._tokens < 2 else (self._last - first) / (self._tokens - 1),
            tokens=self._tokens,
            served=self._served,
            error=error,
        )


class Outcomes:
    """Of one front. Lives on its event loop."""

    def __init__(self, hearer: Hearer) -> None:
        self._hearer = hearer
        self._kept: deque[Outcome] = deque(maxlen=_KEPT)
        self._sending: asyncio.Task[None] | None = None
        self._full = asyncio.Event()

    def add(self, outcome: Outcome) -> None:
        """Told within a tenth of a second, without making anyone wait."""
        self._kept.append(outcome)
        if len(self._kept) >= _BATCH:
            self._full.set()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.ensure_future(self._send())

    def close(self) -> None:
        """What was not told yet is lost."""
        if self._sending:
            self._sending.cancel()

    async def _send(self) -> None:
        while self._kept:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), _GATHER_SECONDS)
            batch = tuple(self._kept.popleft() for _ in range(min(_BATCH, len(self._kept))))
            if len(self._kept) < _BATCH:
                self._full.clear()
            with suppress(ServingError):
                await self._hearer.finished(batch)
