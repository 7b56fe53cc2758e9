"""What ours is compared with: well-known rules and the leaders' published formulas. Each knows what a router would.

    round_robin          each worker in turn
    least_loaded         fewest prompt tokens to compute; fewest requests to decode
    longest_prefix       most of the prompt cached, then fewest tokens to compute
    queue_plus_uncached  fewest tokens to compute before and of this prompt
    dynamo               NVIDIA Dynamo's cost: prompt blocks not cached + blocks in the router's own books
    llm-d                llm-d's scorers in [0, 1]: queue 2, free KV 2, prefix 3; the highest sum

`variants` are the weights that tuning tries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, ClassVar

from cluster.simulate.router import Known, Router

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cluster.scheduler.costs import RequestShape
    from diptych.types import WorkerId


class RoundRobin(Router):
    """Blind."""

    name: ClassVar[str] = "round_robin"

    def prefill(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return pool[self.turn % len(pool)]

    def decode(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return pool[self.turn % len(pool)]


class LeastLoaded(Router):
    """Blind to caches."""

    name: ClassVar[str] = "least_loaded"

    def prefill(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return min(pool, key=lambda worker: worker.queued_tokens)

    def decode(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return min(pool, key=lambda worker: worker.requests)


class LongestPrefix(LeastLoaded):
    """Blind to load, but for ties."""

    name: ClassVar[str] = "longest_prefix"

    def prefill(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return max(pool, key=lambda worker: (hits.get(worker.id, 0), -worker.queued_tokens))


class QueuePlusUncached(LeastLoaded):
    """Weighs both, in tokens."""

    name: ClassVar[str] = "queue_plus_uncached"

    def __init__(self, queue: float = 1.0, decode_by: str = "requests") -> None:
        """`decode_by`: what of a decode worker has to be least, `requests` or `blocks`."""
        super().__init__()
        self._queue = queue
        self._decode_by = decode_by

    @classmethod
    def variants(cls) -> Iterator[Callable[[], Router]]:
        return (partial(cls, queue, by) for queue, by in product((0.5, 1.0, 2.0), ("requests", "blocks")))

    @property
    def weights(self) -> str:
        return f"queue {self._queue:g}, decode by {self._decode_by}"

    def prefill(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return min(pool, key=lambda worker: self._queue * worker.queued_tokens + uncached_tokens(shape, hits, worker))

    def decode(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return min(pool, key=lambda worker: worker.requests if self._decode_by == "requests" else worker.booked_blocks)


class Dynamo(Router):
    """Prefill by overlap and the router's books, decode by its books alone.

    `local_below` is the conditional disaggregation that ships switched off: a prompt with fewer uncached tokens on its
    decode worker, and less than 0.7 of it uncached, is computed there.
    """

    name: ClassVar[str] = "dynamo"

    def __init__(self, overlap: float = 1.0, local_below: int = 0) -> None:
        super().__init__()
        self._overlap = overlap
        self._local_below = local_below

    @classmethod
    def variants(cls) -> Iterator[Callable[[], Router]]:
        return (partial(cls, overlap, below) for overlap, below in product((0.5, 1.0, 2.0), (0, 2048)))

    @property
    def weights(self) -> str:
        return f"overlap {self._overlap:g}, local below {self._local_below:,}"

    def prefill(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return min(
            pool,
            key=lambda worker: max(
                0.0, worker.booked_tokens + shape.prompt_tokens - self._overlap * hits.get(worker.id, 0)
            ),
        )

    def decode(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return min(pool, key=lambda worker: worker.booked_blocks)

    def is_local(self, shape: RequestShape, hits: Mapping[WorkerId, int], decode: Known) -> bool:
        uncached = uncached_tokens(shape, hits, decode)
        return uncached < self._local_below and uncached < 0.7 * shape.prompt_tokens


@dataclass(frozen=True, slots=True)
class Weights:
    """Of llm-d's scorers, as in its default configuration."""

    queue: float = 2.0
    free: float = 2.0
    prefix: float = 3.0
    local_below: int = 0
    """Its decider: a prompt with fewer uncached tokens on the decode worker is computed there."""

    def __str__(self) -> str:
        return f"queue {self.queue:g}, free {self.free:g}, prefix {self.prefix:g}, local below {self.local_below:,}"


class LlmD(Router):
    """Decode first, then whether to disaggregate, then prefill."""

    name: ClassVar[str] = "llm-d"

    def __init__(self, weights: Weights = Weights()) -> None:
        super().__init__()
        self._weights = weights

    @classmethod
    def variants(cls) -> Iterator[Callable[[], Router]]:
        grid = product(((2.0, 2.0, 3.0), (4.0, 1.0, 1.0), (4.0, 2.0, 3.0), (8.0, 1.0, 3.0)), (0, 2048))
        return (partial(cls, Weights(*scores, below)) for scores, below in grid)

    @property
    def weights(self) -> str:
        return str(self._weights)

    def prefill(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return self._best(shape, hits, pool)

    def decode(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        return self._best(shape, hits, pool)

    def is_local(self, shape: RequestShape, hits: Mapping[WorkerId, int], decode: Known) -> bool:
        return uncached_tokens(shape, hits, decode) < self._weights.local_below

    def _best(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        queues = [worker.waiting_requests for worker in pool]
        shortest, span = min(queues), max(queues) - min(queues) or 1

        def score(worker: Known) -> float:
            free = (worker.load.blocks_free + worker.load.blocks_cached) / worker.info.blocks
            queue = 1 - (worker.waiting_requests - shortest) / span
            prefix = hits.get(worker.id, 0) / shape.prompt_tokens
            return self._weights.queue * queue + self._weights.free * free + self._weights.prefix * prefix

        return max(pool, key=lambda worker: (score(worker), -((pool.index(worker) - self.turn) % len(pool))))


def uncached_tokens(shape: RequestShape, hits: Mapping[WorkerId, int], worker: Known) -> int:
    """Of the prompt, to compute there."""
    return max(0, shape.prompt_tokens - hits.get(worker.id, 0))


BASELINES: tuple[type[Router], ...] = (RoundRobin, LeastLoaded, LongestPrefix, QueuePlusUncached, Dynamo, LlmD)
