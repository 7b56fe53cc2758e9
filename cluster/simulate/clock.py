"""Virtual time: what is due when, in one order. Knows no event's meaning."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Clock:
    """Seconds from 0. What is due at the same moment happens in the order in which it was planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._turns = count()
        self._due: list[tuple[float, int, Planned]] = []

    def at(self, moment: float, happen: Callable[[], None]) -> Planned:
        """Plan a call; a moment that is over is now."""
        planned = Planned(happen)
        heappush(self._due, (max(moment, self.now), next(self._turns), planned))
        return planned

    def after(self, seconds: float, happen: Callable[[], None]) -> Planned:
        """Plan a call in so many seconds."""
        return self.at(self.now + seconds, happen)

    def stop(self) -> None:
        """Forget what is planned."""
        self._due.clear()

    def run(self) -> None:
        """Until nothing is planned."""
        while self._due:
            self.now, _, planned = heappop(self._due)
            if planned.happen is not None:
                planned.happen()


class Planned:
    """One planned call."""

    __slots__ = ("happen",)

    def __init__(self, happen: Callable[[], None]) -> None:
        self.happen: Callable[[], None] | None = happen

    def cancel(self) -> None:
        """It doesn't happen; harmless afterwards."""
        self.happen = None
