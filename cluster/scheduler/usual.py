"""What most requests have to wait, learned from those that were placed. Knows no worker and no request.

A quantile followed by steps of a share of itself (stochastic approximation, Robbins and Monro 1951): up
by its share when a request is above it, down by the rest when below, so it stands still where the
wanted share is below. No unit and no scale goes in, and what was long ago is forgotten.
"""

from __future__ import annotations

import math
from typing import Final

KEPT: Final = 0.985
"""The share of requests that keep to what is usual."""
_STEP: Final = 0.1
"""Of its logarithm: a hundred requests change it by a factor of e at most."""


class Usual:
    """Seconds until the first token that all but a few requests keep to."""

    def __init__(self) -> None:
        self._logarithm: float | None = None

    @property
    def seconds(self) -> float | None:
        """None before the first request."""
        return None if self._logarithm is None else math.exp(self._logarithm)

    def add(self, seconds: float) -> None:
        """A request was placed with so long to wait."""
        now = math.log(max(seconds, 1e-6))
        if self._logarithm is None:
            self._logarithm = now
        else:
            self._logarithm += _STEP * (KEPT if now > self._logarithm else KEPT - 1.0)
