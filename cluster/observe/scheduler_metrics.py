"""What the scheduler expected against what came about, as Prometheus metrics. Knows ClusterStatus alone.

A lying index shows as diptych_hit_tokens_missed_total growing: tokens that it said were cached and that nobody found.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from diptych.types import TTFT_ERROR_BOUNDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from diptych.types import Accuracy, ClusterStatus


def scheduler_families(status: ClusterStatus) -> Iterator[Metric]:
    """Every family."""
    accuracy = status.accuracy
    yield _ttft_errors(status.model, accuracy)
    for name, meaning, value in (
        ("scheduler_cpu_seconds", "CPU time of all placement decisions.", status.decision_cpu_seconds),
        ("ttft_predicted_seconds", "Predicted times to first token, summed.", accuracy.predicted_ttft_seconds),
        ("ttft_actual_seconds", "Actual ones of the same requests, summed.", accuracy.actual_ttft_seconds),
        ("ttft_error_seconds", "|predicted - actual| time to first token, summed.", accuracy.ttft_error_seconds),
        ("itl_actual_seconds", "Mean times between tokens, summed over requests.", accuracy.actual_itl_seconds),
        ("itl_error_seconds", "|predicted - actual| mean time between tokens, summed.", accuracy.itl_error_seconds),
        ("hit_tokens_predicted", "Prompt tokens that the index said are cached.", accuracy.predicted_hit_tokens),
        ("hit_tokens_actual", "Prompt tokens of the same requests found cached.", accuracy.actual_hit_tokens),
        ("hit_tokens_missed", "Said to be cached, not found: the index lies.", accuracy.hits_missed_tokens),
        ("hit_tokens_unforeseen", "Found cached, not foretold: the index lags.", accuracy.hits_unforeseen_tokens),
    ):
        family = CounterMetricFamily(f"diptych_{name}", meaning, labels=("model_name",))
        family.add_metric([status.model], value)
        yield family


def _ttft_errors(model: str, accuracy: Accuracy) -> Metric:
    bounds = (*map(str, TTFT_ERROR_BOUNDS), "+Inf")
    counts = accumulate(accuracy.ttft_errors or (0,) * len(bounds))
    meaning = "|predicted - actual| / actual time to first token."
    family = HistogramMetricFamily("diptych_ttft_error_ratio", meaning, labels=("model_name",))
    family.add_metric([model], list(zip(bounds, counts, strict=True)), None)
    return family
