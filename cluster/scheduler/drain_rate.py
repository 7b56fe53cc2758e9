"""How fast a queue empties, learned from what left it. Knows no request and no worker."""

from __future__ import annotations

_KEPT = 1 - 1 / 64
"""After each departure: the last 64 or so count."""
_PRIOR_SECONDS = 1.0
"""What was seen has to last so long before it outweighs what was assumed."""


class DrainRate:
    """Work that leaves per second while somebody waits."""

    def __init__(self) -> None:
        self._work = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        """Of the last departure, or of the first arrival in an empty queue; None while it is empty."""

    def began(self, now: float) -> None:
        """Somebody waits from now on."""
        self._since = now

    def ended(self) -> None:
        """Nobody waits any more."""
        self._since = None

    def left(self, work: float, now: float) -> None:
        """Somebody who waited was served."""
        assert self._since is not None, "nobody waited"
        self._work = _KEPT * self._work + work
        self._seconds = _KEPT * self._seconds + now - self._since
        self._since = now

    def seconds_for(self, work: float, now: float, assumed: float) -> float:
        """Until so much has left. `assumed`: work per second before anything was seen; above 0."""
        pending = 0.0 if self._since is None else now - self._since
        rate = (self._work + assumed * _PRIOR_SECONDS) / (self._seconds + pending + _PRIOR_SECONDS)
        return work / rate
