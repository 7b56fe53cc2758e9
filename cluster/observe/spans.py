"""A request as one OpenTelemetry span: what was expected of it and what came about. Knows no exporter.

Without an SDK in the process (`opentelemetry-instrument`, or one of its owner's) the API does nothing.
Ray brings it: it is no dependency of ours alone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry import trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

    from diptych.types import Outcome, Placement


class Spans:
    """Of one front."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """None takes the process's own."""
        self._tracer = trace.get_tracer("diptych", tracer_provider=provider)

    def tell(self, outcome: Outcome, placement: Placement | None, arrived: float) -> None:
        """It is over now. `arrived`: Unix seconds."""
        span = self._tracer.start_span("diptych.request", start_time=round(arrived * 1e9))
        if span.is_recording():
            span.set_attributes({f"diptych.{name}": value for name, value in _told(outcome, placement)})
            if outcome.error:
                span.set_status(trace.StatusCode.ERROR, outcome.error)
        span.end(time.time_ns())


def _told(outcome: Outcome, placement: Placement | None) -> Iterator[tuple[str, AttributeValue]]:
    yield "request", outcome.request
    yield "queue_seconds", outcome.queue_seconds
    yield "tokens", outcome.tokens
    if outcome.ttft_seconds is not None:
        yield "ttft_seconds", outcome.ttft_seconds
    if outcome.itl_seconds is not None:
        yield "itl_seconds", outcome.itl_seconds
    if (served := outcome.served) is not None:
        yield "how", served.how
        yield "prefill_worker", served.prefill_worker
        yield "decode_worker", served.decode_worker
        yield "cached_tokens", served.cached_tokens
        yield "kv_bytes", served.kv_bytes_sent
        yield "kv_wait_seconds", served.kv_wait_seconds
    if placement is not None and (predicted := placement.predicted) is not None:
        yield "predicted_ttft_seconds", predicted.ttft_seconds
        yield "predicted_itl_seconds", predicted.itl_seconds
        yield "predicted_cached_tokens", predicted.cached_tokens
        yield "predicted_kv_bytes", predicted.transfer_bytes
