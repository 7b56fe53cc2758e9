"""A replay in numbers."""

from __future__ import annotations

import pytest

from cluster.replay.figures import Spread, figures
from cluster.replay.player import Played


def played(ttft: float | None, predicted: float | None = None, *, error: str = "", late: float = 0.0) -> Played:
    return Played(
        request_id="r",
        prompt_tokens=100,
        late_seconds=late,
        ttft_seconds=ttft,
        itl_seconds=0.01,
        seconds=1.0,
        tokens=5,
        cached_tokens=25,
        error=error,
        predicted_ttft_seconds=predicted,
        placed_ttft_seconds=ttft if predicted is not None else None,
    )


def test_times_and_hits_are_of_answered_requests() -> None:
    found = figures([*(played(at / 100) for at in range(101)), played(None, error="overloaded", late=2.0)], 10.0)
    assert (found.requests, found.answered, found.errors, found.late_seconds) == (102, 101, {"overloaded": 1}, 2.0)
    assert found.ttft == pytest.approx(Spread(0.5, 0.9, 0.99))
    assert (found.prompt_tokens, found.tokens, found.hit_rate) == (10_100, 505, 0.25)
    assert found.prediction is None


def test_predictions_are_held_against_always_predicting_the_median() -> None:
    warm_up = [played(1.0, 9.0)] * 2
    found = figures([*warm_up, played(1.0, 1.1), played(2.0, 1.8), played(4.0, 4.4), played(3.0)], 1.0, warm_up=2)
    assert found.prediction is not None
    # Actual times of 1, 2 and 4 s, all missed by a tenth; their median is 2 s.
    assert found.prediction == pytest.approx((3, 0.1, 0.5, 0.2, 1.0))


def test_a_single_request_is_its_own_spread() -> None:
    assert figures([played(0.5)], 1.0).ttft == Spread(0.5, 0.5, 0.5)
