"""The scheduler's view of the cluster as Prometheus metrics. Knows ClusterStatus, and no front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from cluster.observe.scheduler_metrics import scheduler_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.core import Metric

    from diptych.types import ClusterStatus, Load, QueueStatus, WorkerStatus

_WORKER_LABELS: Final = ("worker", "role")
_BLOCK_STATES: Final = ("free", "cached", "held", "granted", "lent")
_COUNTERS: Final = {
    "steps": "Engine steps.",
    "decode_steps": "Engine steps that decoded.",
    "decode_rows": "Sequences decoded, summed over steps: over diptych_decode_steps it is the batch's occupancy.",
    "prompt_tokens_computed": "Prompt tokens computed.",
    "prompt_tokens_cached": "Prompt tokens taken from the prefix cache.",
    "tokens_emitted": "Tokens emitted.",
    "requests_finished": "Requests finished.",
    "requests_cancelled": "Requests cancelled.",
    "preemptions": "Requests preempted.",
    "blocks_sent": "KV blocks sent to other workers.",
    "bytes_sent": "KV bytes sent to other workers.",
    "blocks_received": "KV blocks received from other workers.",
    "bytes_received": "KV bytes received from other workers.",
    "transfers_committed": "KV hand-offs that ended in a commit.",
    "transfers_failed": "KV hand-offs that did not.",
    "leaked_blocks": "KV blocks that an audit found without an owner.",
    "engine_cpu_seconds": "CPU time of the engine thread.",
}
"""Every total of `Counters`, exported as diptych_<name>_total."""


class ClusterCollector(Collector):
    """One status, read once; None when the scheduler didn't answer."""

    def __init__(self, status: ClusterStatus | None) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Every family, the scheduler's own first."""
        up = GaugeMetricFamily("diptych_scheduler_up", "Whether the scheduler answered this scrape.")
        up.add_metric([], 0 if self._status is None else 1)
        yield up
        if self._status is None:
            return
        yield from _cluster(self._status)
        yield from _queues(self._status.queues)
        yield from scheduler_families(self._status)
        yield from _autoscale(self._status)
        yield from _workers(self._status.workers)


def _cluster(status: ClusterStatus) -> Iterator[Metric]:
    loads = [worker.load for worker in status.workers if worker.alive]
    blocks = sum(worker.info.blocks for worker in status.workers if worker.alive)
    used = sum(load.blocks_held + load.blocks_granted + load.blocks_lent for load in loads)
    preemptions = sum(worker.counters.preemptions for worker in status.workers)
    model = status.model
    yield _gauge("vllm:num_requests_running", "Requests running.", model, sum(load.running_requests for load in loads))
    waiting = sum(load.waiting_requests for load in loads) + sum(queue.length for queue in status.queues)
    yield _gauge("vllm:num_requests_waiting", "Requests waiting, for a worker or at one.", model, waiting)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", model, used / max(1, blocks))
    yield _counter("vllm:num_preemptions", "Requests preempted.", model, preemptions)
    yield _counter("diptych_requests_placed", "Requests placed by the scheduler.", model, status.requests_placed)
    yield _gauge("diptych_index_blocks", "Distinct blocks in the prefix index.", model, status.index_blocks)


def _queues(queues: Sequence[QueueStatus]) -> Iterator[Metric]:
    """By class of priority."""
    length = GaugeMetricFamily("diptych_queue_length", "Requests waiting for a worker.", labels=("class",))
    oldest = GaugeMetricFamily("diptych_queue_oldest_seconds", "How long the oldest of them waits.", labels=("class",))
    waited = SummaryMetricFamily(
        "diptych_queue_wait_seconds", "How long placed requests waited for a worker.", labels=("class",)
    )
    rejected = CounterMetricFamily(
        "diptych_queue_rejections", "Requests refused at their arrival, by why.", labels=("class", "reason")
    )
    for queue in queues:
        length.add_metric([queue.name], queue.length)
        oldest.add_metric([queue.name], queue.oldest_seconds)
        waited.add_metric([queue.name], queue.released, queue.waited_seconds)
        for reason, count in queue.rejected:
            rejected.add_metric([queue.name, reason], count)
    yield from (length, oldest, waited, rejected)


def _autoscale(status: ClusterStatus) -> Iterator[Metric]:
    """Nothing where it is off."""
    told = status.autoscale
    if told is None:
        return
    wanted = GaugeMetricFamily("diptych_autoscale_wanted", "Workers of each role that it wants.", labels=("role",))
    actual = GaugeMetricFamily("diptych_autoscale_actual", "Workers of each role that live.", labels=("role",))
    for role, count in told.wanted:
        wanted.add_metric([role], count)
        actual.add_metric([role], sum(worker.alive and worker.info.role == role for worker in status.workers))
    changes = CounterMetricFamily(
        "diptych_autoscale_changes", "Workers that got another role, came or went, by why.", labels=("reason",)
    )
    for reason, count in told.changes:
        changes.add_metric([reason], count)
    yield from (wanted, actual, changes)
    yield _counter("diptych_autoscale_reversals", "Moves back of roles.", status.model, told.reversals)


def _workers(workers: Sequence[WorkerStatus]) -> Iterator[Metric]:
    yield _per_worker("diptych_worker_up", "Whether the worker is alive.", workers, lambda one: one.alive)
    yield _per_worker(
        "diptych_worker_report_age_seconds", "Age of its last report.", workers, lambda one: one.report_age_seconds
    )
    yield _per_worker("diptych_blocks_total", "KV blocks in its pool.", workers, lambda one: one.info.blocks)
    yield _per_worker("diptych_requests_running", "Requests running.", workers, lambda one: one.load.running_requests)
    yield _per_worker("diptych_requests_waiting", "Requests waiting.", workers, lambda one: one.load.waiting_requests)
    yield _per_worker(
        "diptych_waiting_tokens", "Prompt tokens queued, not computed.", workers, lambda one: one.load.waiting_tokens
    )
    yield _blocks(workers)
    yield _per_worker(
        "diptych_cancel_steps_max",
        "Most engine steps between a cancel's arrival and the release of what the request held.",
        workers,
        lambda one: one.counters.cancel_steps_max,
    )
    for name, meaning in _COUNTERS.items():
        yield _worker_counter(name, meaning, workers)


def _blocks(workers: Sequence[WorkerStatus]) -> Metric:
    family = GaugeMetricFamily("diptych_blocks", "KV blocks by state.", labels=(*_WORKER_LABELS, "state"))
    for worker in workers:
        for state in _BLOCK_STATES:
            family.add_metric([worker.info.id, worker.info.role, state], _blocks_in(worker.load, state))
    return family


def _blocks_in(load: Load, state: str) -> int:
    count: int = getattr(load, f"blocks_{state}")
    return count


def _worker_counter(name: str, meaning: str, workers: Sequence[WorkerStatus]) -> Metric:
    family = CounterMetricFamily(f"diptych_{name}", meaning, labels=_WORKER_LABELS)
    for worker in workers:
        family.add_metric([worker.info.id, worker.info.role], getattr(worker.counters, name))
    return family


def _per_worker(
    name: str, meaning: str, workers: Sequence[WorkerStatus], value: Callable[[WorkerStatus], float]
) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=_WORKER_LABELS)
    for worker in workers:
        family.add_metric([worker.info.id, worker.info.role], value(worker))
    return family


def _gauge(name: str, meaning: str, model: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=("model_name",))
    family.add_metric([model], value)
    return family


def _counter(name: str, meaning: str, model: str, value: float) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=("model_name",))
    family.add_metric([model], value)
    return family
