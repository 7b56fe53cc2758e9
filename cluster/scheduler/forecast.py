"""Tokens of prompts in seconds, at rates learned from what workers report. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cluster.scheduler.costs import RequestShape
    from cluster.scheduler.view import ClusterView


class Forecast(Protocol):
    """What admission asks of whoever knows rates."""

    def prefill_seconds(self, shape: RequestShape) -> float:
        """To compute what nobody has cached of this prompt, on a typical worker."""
        ...

    def token_seconds(self) -> float:
        """To compute one prompt token, on a typical worker."""
        ...


class LearnedForecast:
    """By the rates that the view learned."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view

    def prefill_seconds(self, shape: RequestShape) -> float:
        held = self._view.held_tokens(shape.granules)
        cached = float(held[held.argmax()])
        return max(1.0, shape.prompt_tokens - cached) * self.token_seconds()

    def token_seconds(self) -> float:
        return self._view.fleet.mean_token_seconds()
