"""Tokens of prompts in seconds, at rates learned from what workers report. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cluster.scheduler.costs import RequestShape
    from cluster.scheduler.view import ClusterView, WorkerView
    from diptych.types import Report, WorkerId

_NEWEST = 0.25
"""Weight of the newest sample."""
_PRIOR_SECONDS_PER_TOKEN = 0.001
"""Until a worker was seen computing."""


class Forecast(Protocol):
    """What admission asks of whoever knows rates."""

    def backlog_seconds(self, worker: WorkerId, now: float) -> float:
        """Until the prompts that are with this worker are computed."""
        ...

    def prefill_seconds(self, shape: RequestShape) -> float:
        """To compute what nobody has cached of this prompt, on a typical worker."""
        ...

    def token_seconds(self) -> float:
        """To compute one prompt token, on a typical worker."""
        ...


class TokenForecast:
    """One rate for each worker: prompt tokens over the time between two reports, while prompts waited."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._seconds: dict[WorkerId, float] = {}
        """Per prompt token."""

    def backlog_seconds(self, worker: WorkerId, now: float) -> float:
        known = self._view.workers[worker]
        return max(0.0, known.queued_tokens * self._per_token(worker) - (now - known.heard))

    def prefill_seconds(self, shape: RequestShape) -> float:
        cached = max(self._view.longest_prefix(shape.granules).values(), default=0)
        return max(1, shape.prompt_tokens - cached) * self.token_seconds()

    def token_seconds(self) -> float:
        known = self._seconds
        return sum(known.values()) / len(known) if known else _PRIOR_SECONDS_PER_TOKEN

    def learn(self, before: WorkerView, report: Report, now: float) -> None:
        """What the worker did since it was last heard."""
        tokens = report.counters.prompt_tokens_computed - before.counters.prompt_tokens_computed
        if tokens <= 0 or not before.load.waiting_tokens:
            return
        sample = (now - before.heard) / tokens
        known = self._seconds.get(report.worker, sample)
        self._seconds[report.worker] = known + _NEWEST * (sample - known)

    def forget(self, worker: WorkerId) -> None:
        """It is gone."""
        self._seconds.pop(worker, None)

    def _per_token(self, worker: WorkerId) -> float:
        return self._seconds.get(worker) or self.token_seconds()
