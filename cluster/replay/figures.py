"""What a replay found, in a few numbers. Knows how requests went, not how they were sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.replay.player import Played


class Spread(NamedTuple):
    """Of one measure over all requests, in seconds."""

    p50: float
    p90: float
    p99: float


class PredictionError(NamedTuple):
    """Predicted against actual time to first token, from the placement on. Medians over requests."""

    requests: int
    relative: float
    """|predicted - actual| / actual."""
    median_relative: float
    """The same, had the median of all been predicted every time."""
    seconds: float
    median_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one replay."""

    requests: int
    answered: int
    errors: dict[str, int]
    seconds: float
    """From the first request to the last answer."""
    prompt_tokens: int
    tokens: int
    hit_rate: float
    """Share of answered requests' prompt tokens found cached."""
    ttft: Spread | None
    itl: Spread | None
    late_seconds: float
    """The latest request was sent so long after its time: more than a little, and the client was the limit."""
    prediction: PredictionError | None


def figures(played: Sequence[Played], seconds: float, *, warm_up: int = 0) -> Figures:
    """Predictions of the first `warm_up` requests don't count: rates are learned from them."""
    whole = [one for one in played if not one.error]
    prompt_tokens = sum(one.prompt_tokens for one in whole)
    return Figures(
        requests=len(played),
        answered=len(whole),
        errors=dict(Counter(one.error for one in played if one.error)),
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        tokens=sum(one.tokens for one in whole),
        hit_rate=sum(one.cached_tokens for one in whole) / max(1, prompt_tokens),
        ttft=_spread(one.ttft_seconds for one in whole),
        itl=_spread(one.itl_seconds for one in whole),
        late_seconds=max(one.late_seconds for one in played),
        prediction=_prediction(played[warm_up:]),
    )


def _spread(measured: Iterable[float | None]) -> Spread | None:
    known = sorted(one for one in measured if one is not None)
    if len(known) < 2:
        return Spread(*known * 3) if known else None
    cuts = quantiles(known, n=100, method="inclusive")
    return Spread(cuts[49], cuts[89], cuts[98])


def _prediction(played: Sequence[Played]) -> PredictionError | None:
    pairs = [
        (one.predicted_ttft_seconds, one.placed_ttft_seconds)
        for one in played
        if one.predicted_ttft_seconds is not None and one.placed_ttft_seconds
    ]
    if not pairs:
        return None
    middle = median(actual for _, actual in pairs)
    return PredictionError(
        requests=len(pairs),
        relative=median(abs(predicted - actual) / actual for predicted, actual in pairs),
        median_relative=median(abs(middle - actual) / actual for _, actual in pairs),
        seconds=median(abs(predicted - actual) for predicted, actual in pairs),
        median_seconds=median(abs(middle - actual) for _, actual in pairs),
    )
