"""One span for each request, to whatever OpenTelemetry SDK its process has."""

from __future__ import annotations

import time

import pytest

from cluster.observe.spans import Spans
from diptych.types import Outcome, Placement, Prediction, RequestId, Served, WorkerId

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the SDK comes with ray[default]")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")


def test_a_span_says_what_was_expected_and_what_came_about() -> None:
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    served = Served(how="local", prefill_worker="d", decode_worker="d", prompt_tokens_computed=4, cached_tokens=16)
    predicted = Prediction(0.0, 0.2, 0.01, 32, 0)
    placement = Placement(decode=WorkerId("d"), prefill=None, how="local", predicted=predicted)
    arrived = time.time() - 1.5
    spans = Spans(provider)
    spans.tell(Outcome(RequestId("r~1"), 0.1, 0.3, 0.02, 5, served), placement, arrived)
    spans.tell(Outcome(RequestId("r~2"), 0.1, None, None, 0, None, "cancelled"), None, arrived)
    whole, cancelled = exporter.get_finished_spans()
    assert (whole.name, whole.attributes["diptych.request"]) == ("diptych.request", "r~1")
    assert (whole.attributes["diptych.ttft_seconds"], whole.attributes["diptych.predicted_ttft_seconds"]) == (0.3, 0.2)
    assert (whole.attributes["diptych.cached_tokens"], whole.attributes["diptych.predicted_cached_tokens"]) == (16, 32)
    assert whole.start_time == pytest.approx(arrived * 1e9, abs=1e4)
    assert whole.end_time - whole.start_time >= 1.5e9
    assert (whole.status.description, cancelled.status.description) == (None, "cancelled")
    assert "diptych.ttft_seconds" not in cancelled.attributes


def test_without_an_sdk_it_costs_next_to_nothing() -> None:
    spans, outcome = Spans(), Outcome(RequestId("r"), 0.1, 0.3, 0.02, 5, None)
    began, rounds = time.thread_time(), 200
    for _ in range(rounds):
        spans.tell(outcome, None, 1.0)
    assert (time.thread_time() - began) / rounds < 100e-6
