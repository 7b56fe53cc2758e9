"""How predictions compare with what came about, in running sums. Knows outcomes; not who predicts, or how."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from diptych.types import TTFT_ERROR_BOUNDS, Accuracy

if TYPE_CHECKING:
    from diptych.types import Outcome, Placement, Prediction


def compared(so_far: Accuracy, placement: Placement, outcome: Outcome) -> Accuracy:
    """With one more outcome. Those without a first token, and placements that predicted nothing, tell nothing."""
    predicted = placement.predicted
    if predicted is None or outcome.ttft_seconds is None:
        return so_far
    so_far = _first_token(so_far, predicted.ttft_seconds, outcome.ttft_seconds)
    if outcome.itl_seconds is not None:
        so_far = _between_tokens(so_far, predicted.itl_seconds, outcome.itl_seconds)
    return _hits(so_far, placement, predicted, outcome)


def _first_token(so_far: Accuracy, predicted: float, actual: float) -> Accuracy:
    error = abs(predicted - actual)
    errors = list(so_far.ttft_errors or (0,) * (len(TTFT_ERROR_BOUNDS) + 1))
    errors[bisect_left(TTFT_ERROR_BOUNDS, error / actual) if actual > 0 else -1] += 1
    return so_far._replace(
        outcomes=so_far.outcomes + 1,
        predicted_ttft_seconds=so_far.predicted_ttft_seconds + predicted,
        actual_ttft_seconds=so_far.actual_ttft_seconds + actual,
        ttft_error_seconds=so_far.ttft_error_seconds + error,
        ttft_errors=tuple(errors),
    )


def _between_tokens(so_far: Accuracy, predicted: float, actual: float) -> Accuracy:
    return so_far._replace(
        itl_outcomes=so_far.itl_outcomes + 1,
        actual_itl_seconds=so_far.actual_itl_seconds + actual,
        itl_error_seconds=so_far.itl_error_seconds + abs(predicted - actual),
    )


def _hits(so_far: Accuracy, placement: Placement, predicted: Prediction, outcome: Outcome) -> Accuracy:
    """Who computed the prompt elsewhere than it was placed looked into another cache."""
    served = outcome.served
    if served is None or served.how != placement.how:
        return so_far
    surplus = predicted.cached_tokens - served.cached_tokens
    return so_far._replace(
        hit_outcomes=so_far.hit_outcomes + 1,
        predicted_hit_tokens=so_far.predicted_hit_tokens + predicted.cached_tokens,
        actual_hit_tokens=so_far.actual_hit_tokens + served.cached_tokens,
        hits_missed_tokens=so_far.hits_missed_tokens + max(0, surplus),
        hits_unforeseen_tokens=so_far.hits_unforeseen_tokens + max(0, -surplus),
    )
