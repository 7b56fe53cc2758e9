"""What a scrape of a front says."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.cluster_metrics import ClusterCollector
from diptych.errors import NoWorker, WorkerLost
from diptych.types import Accuracy, ClusterStatus, Counters, QueueStatus

if TYPE_CHECKING:
    from diptych import Client
    from tests.cluster.conftest import ScriptedService, Wire


def scrape(wire: Wire) -> dict[tuple[str, frozenset[str]], float]:
    """Sample values by name and label values."""
    families = text_string_to_metric_families(httpx.get(f"{wire.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.values())): sample.value for sample in samples}


def grown(
    before: dict[tuple[str, frozenset[str]], float],
    after: dict[tuple[str, frozenset[str]], float],
    name: str,
    *labels: str,
) -> float:
    key = (name, frozenset(("tiny", *labels)))
    return after[key] - before.get(key, 0)


def test_an_answer_counts_in_vllms_names_whichever_protocol_it_took(wire: Wire, client: Client) -> None:
    before = scrape(wire)
    list(client.generate("hello"))
    httpx.post(f"{wire.url}/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 3})
    after = scrape(wire)
    assert grown(before, after, "vllm:prompt_tokens_total") == 10
    assert grown(before, after, "vllm:generation_tokens_total") == 11 + 2
    assert grown(before, after, "vllm:prefix_cache_queries_total") == 10
    assert grown(before, after, "vllm:prefix_cache_hits_total") == 6
    assert grown(before, after, "vllm:request_success_total", "stop") == 1
    assert grown(before, after, "vllm:request_success_total", "length") == 1
    assert grown(before, after, "vllm:time_to_first_token_seconds_count") == 2
    assert grown(before, after, "vllm:e2e_request_latency_seconds_count") == 2
    assert grown(before, after, "vllm:inter_token_latency_seconds_count") == 10 + 1


def test_errors_and_hang_ups_count_apart_from_answers(wire: Wire, client: Client, service: ScriptedService) -> None:
    before = scrape(wire)
    service.fail_at, service.error = 0, WorkerLost("gone")
    with pytest.raises(WorkerLost):
        list(client.generate("hello"))
    service.error, service.hold_at = None, 1
    answer = client.generate("hello")
    next(answer)
    service.held.get(timeout=10)
    assert scrape(wire)["diptych_front_requests_in_flight", frozenset()] == 1
    answer.close()
    closed = [service.closed.get(timeout=10) for _ in range(2)]
    after = scrape(wire)
    assert grown(before, after, "diptych_request_failures_total", "worker_lost") == 1
    assert grown(before, after, "vllm:request_success_total", "abort") == 1
    assert after["diptych_front_requests_in_flight", frozenset()] == 0
    for request in closed:
        service.closed.put(request)


def test_the_clusters_state_is_told_as_the_scheduler_sees_it(wire: Wire) -> None:
    samples = scrape(wire)
    assert samples["vllm:num_requests_running", frozenset({"tiny"})] == 4
    assert samples["vllm:num_requests_waiting", frozenset({"tiny"})] == 2
    assert samples["vllm:kv_cache_usage_perc", frozenset({"tiny"})] == 0.3
    assert samples["diptych_blocks", frozenset({"decode-0", "decode", "held"})] == 25
    assert samples["diptych_blocks", frozenset({"prefill-0", "prefill", "lent"})] == 5
    assert samples["diptych_leaked_blocks_total", frozenset({"decode-0", "decode"})] == 7
    assert samples["diptych_bytes_sent_total", frozenset({"prefill-0", "prefill"})] == 4096
    assert samples["diptych_decode_rows_total", frozenset({"decode-0", "decode"})] == 10
    assert samples["diptych_scheduler_up", frozenset()] == 1


def test_queues_are_told_by_class() -> None:
    queues = (
        QueueStatus("high", 2, 0.5, 10, 1.5, (("queue full", 3), ("deadline", 1))),
        QueueStatus("low", 0, 0.0, 4, 0.0, ()),
    )
    status = ClusterStatus(model="tiny", build="b", workers=(), requests_placed=0, index_blocks=0, queues=queues)
    told = {
        (sample.name, *sample.labels.values()): sample.value
        for family in ClusterCollector(status).collect()
        for sample in family.samples
    }
    assert told["diptych_queue_length", "high"] == 2
    assert told["diptych_queue_oldest_seconds", "high"] == 0.5
    assert (told["diptych_queue_wait_seconds_count", "high"], told["diptych_queue_wait_seconds_sum", "high"]) == (
        10,
        1.5,
    )
    assert told["diptych_queue_rejections_total", "high", "queue full"] == 3
    assert told["diptych_queue_length", "low"] == 0
    assert told["vllm:num_requests_waiting", "tiny"] == 2


def test_a_scheduler_that_does_not_answer_leaves_the_fronts_own_figures(
    wire: Wire, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def status() -> None:
        raise NoWorker("the scheduler is gone")

    with monkeypatch.context() as patch:
        patch.setattr(service, "status", status)
        samples = scrape(wire)
    assert samples["diptych_scheduler_up", frozenset()] == 0
    assert ("diptych_front_requests_in_flight", frozenset()) in samples


def test_every_counter_of_a_worker_is_exported(wire: Wire) -> None:
    exported = {family.name for family in ClusterCollector(wire.run(wire.service.status())).collect()}
    assert {f"diptych_{counter.name}" for counter in fields(Counters)} <= exported


def test_a_lying_index_and_wrong_predictions_are_seen() -> None:
    accuracy = Accuracy(
        outcomes=3,
        ttft_errors=(1, 0, 0, 0, 0, 0, 1, 1),
        ttft_error_seconds=0.75,
        predicted_hit_tokens=640,
        actual_hit_tokens=500,
        hits_missed_tokens=160,
        hits_unforeseen_tokens=20,
    )
    status = ClusterStatus(
        model="tiny",
        build="b",
        workers=(),
        requests_placed=3,
        index_blocks=40,
        accuracy=accuracy,
        decision_cpu_seconds=0.5,
    )
    samples = [sample for family in ClusterCollector(status).collect() for sample in family.samples]
    told = {(sample.name, sample.labels.get("le", "")): sample.value for sample in samples}
    assert told["diptych_hit_tokens_missed_total", ""] == 160
    assert told["diptych_hit_tokens_unforeseen_total", ""] == 20
    assert told["diptych_hit_tokens_predicted_total", ""] == 640
    assert told["diptych_ttft_error_seconds_total", ""] == 0.75
    assert told["diptych_scheduler_cpu_seconds_total", ""] == 0.5
    assert [told["diptych_ttft_error_ratio_bucket", le] for le in ("0.05", "1.0", "2.0", "+Inf")] == [1, 1, 2, 3]
