"""What a front measures and what the scheduler sees, as Prometheus text. Knows no protocol but that.

Names are vLLM's where it has one, so that its dashboards, autoscalers and load generators read ours.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from cluster.observe.cluster_metrics import ClusterCollector
from diptych.errors import ServingError
from diptych.rpc import reason_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cluster.front.service import Ask, Delta, Service, Usage
    from cluster.front.tokenizer import TextModel
    from diptych.types import Changed, ClusterStatus, Explanation, Operation

STATUS_TIMEOUT_SECONDS: Final = 2.0

_FIRST_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_BUCKETS: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST_BUCKETS: Final = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)


class FrontMetrics:
    """One front's measurements, in a registry of their own."""

    MEDIA_TYPE: ClassVar = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._in_flight = self._gauge("diptych_front_requests_in_flight", "Answers that this front is waiting for.")
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens of finished requests.")
        # One child each, looked up once: the way to it by labels costs as much as counting.
        self._generated = self._counter("vllm:generation_tokens", "Tokens sent to clients.").labels(model)
        self._queried = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in prefix caches.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in prefix caches.")
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "Time to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Time between tokens.", _TOKEN_BUCKETS
        ).labels(model)
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "Time from request to last token.", _REQUEST_BUCKETS
        )
        self._success = self._counter("vllm:request_success", "Requests that ended, by why.", "finished_reason")
        self._failed = self._counter("diptych_request_failures", "Requests that ended in an error.", "reason")

    def observed(self, service: Service) -> Service:
        """The same service, measured. Give it to every protocol of this front."""
        return _ObservedService(service, self)

    async def exposition(self, service: Service) -> bytes:
        """The front's measurements and the cluster's, as Prometheus text."""
        return generate_latest(self._registry) + _cluster_exposition(await _status(service))

    async def measure(self, service: Service, ask: Ask) -> AsyncGenerator[Delta, None]:
        """The answer, passed on as it comes."""
        begun = last = time.perf_counter()
        seen = False
        self._in_flight.inc()
        try:
            async with aclosing(service.generate(ask)) as deltas:
                async for delta in deltas:
                    now = time.perf_counter()
                    if delta.tokens:
                        self._observe_tokens(len(delta.tokens), now - last, first=not seen)
                        seen, last = True, now
                    if delta.usage is not None and delta.finish is not None:
                        self._observe_end(delta.finish, delta.usage, now - begun)
                    yield delta
        except ServingError as error:
            self._failed.labels(self._model, reason_of(error).lower()).inc()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._success.labels(self._model, "abort").inc()
            raise
        finally:
            self._in_flight.dec()

    def _observe_tokens(self, count: int, seconds: float, *, first: bool) -> None:
        self._generated.inc(count)
        if first:
            self._first.labels(self._model).observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def _observe_end(self, finish: str, usage: Usage, seconds: float) -> None:
        self._success.labels(self._model, finish).inc()
        self._whole.labels(self._model).observe(seconds)
        self._prompt.labels(self._model).inc(usage.prompt_tokens)
        self._queried.labels(self._model).inc(usage.prompt_tokens)
        self._hits.labels(self._model).inc(usage.served.cached_tokens)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, registry=self._registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, ("model_name",), buckets=buckets, registry=self._registry)


class _ObservedService:
    """A service whose answers are measured."""

    def __init__(self, service: Service, metrics: FrontMetrics) -> None:
        self._service = service
        self._metrics = metrics

    @property
    def model_name(self) -> str:
        return self._service.model_name

    @property
    def text(self) -> TextModel:
        return self._service.text

    @property
    def max_context(self) -> int:
        return self._service.max_context

    @property
    def ready(self) -> bool:
        return self._service.ready

    def generate(self, ask: Ask) -> AsyncGenerator[Delta, None]:
        return self._metrics.measure(self._service, ask)

    async def status(self) -> ClusterStatus:
        return await self._service.status()

    async def change(self, operation: Operation) -> Changed:
        return await self._service.change(operation)

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        return await self._service.explain(request)


async def _status(service: Service) -> ClusterStatus | None:
    """None when the scheduler doesn't answer in time: a scrape still gets what the front knows."""
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_SECONDS):
            return await service.status()
    except (TimeoutError, ServingError):
        return None


def _cluster_exposition(status: ClusterStatus | None) -> bytes:
    registry = CollectorRegistry()
    registry.register(ClusterCollector(status))
    return generate_latest(registry)
