"""What serving a request in some place would cost, in tokens of prefill work. Chooses nothing.

The prefill side of a hand-off costs the same whichever worker decodes, and the decode side the
same whichever prefills: no term needs the pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import nlargest
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from diptych.types import BlockHash, CostTerm, RequestId, WorkerId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.scheduler.view import WorkerView

Rule: TypeAlias = Literal["auto", "remote", "local"]
"""`placement.how`. auto: the cheapest way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """All that placement needs to know of a request."""

    request: RequestId
    granules: tuple[BlockHash, ...]
    """Names of the prompt's full 16-token granules, chained from the root of the cluster's model."""
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    """Lower goes first."""
    tenant: str = ""
    ttft_seconds: float | None = None
    """The wish of its sender: the first token within so long of the arrival. None: the cluster's default."""
    itl_seconds: float | None = None
    """As `ttft_seconds`, of the mean time between tokens."""
    deadline_seconds: float | None = None
    """From the arrival: later than that nobody wants the answer."""

    @property
    def context(self) -> int:
        """The longest it can become, in tokens."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Prices in tokens of prefill work. Priors: set by reasoning, not by measurement."""

    how: Rule = "auto"
    handoff: float = 16.0
    """Fixed price of two workers instead of one: ticket, rendezvous, commit."""
    transfer_per_block: float = 1.0
    """Mostly hidden: blocks travel while the next chunk is computed."""
    harm_per_running: float = 0.5
    """Each prompt token computed on a worker delays each request it is decoding by so much."""
    load_per_request: float = 8.0
    """Each request on a decode worker makes every step of a newcomer slower."""


class Option(NamedTuple):
    """One worker for one side of the request, with the named parts of its cost."""

    worker: WorkerView
    terms: tuple[CostTerm, ...]
    cost: float


Price: TypeAlias = Callable[["WorkerView"], tuple[float, ...]]
"""The parts of a cost, without their names: every worker is priced, few are told of."""

COMPUTE_TERMS = ("queue", "uncached tokens", "prefix fetch")
STAY_TERMS = ("decode load", "wait for room")
PREFILL_TERMS = COMPUTE_TERMS
DECODE_TERMS = ("transfer", "disturbed decoding", *STAY_TERMS)
ALONE_TERMS = (*COMPUTE_TERMS, "harm to running", *STAY_TERMS)


class Fetch(NamedTuple):
    """A prefix that another worker's cache has."""

    holder: WorkerId
    tokens: int
    price: float


class Costs:
    """The prices of one request on any worker. Reads the view, keeps nothing."""

    def __init__(
        self, shape: RequestShape, policy: Policy, hits: Mapping[WorkerId, int], live: Callable[[WorkerId], bool]
    ) -> None:
        """`hits`: leading prompt tokens each worker has; `live` tells whether it would answer."""
        self._prompt_tokens = shape.prompt_tokens
        self._policy = policy
        self._hits = hits
        # Two: the best one, and who is best for that one itself.
        self._holders = nlargest(2, (who for who in hits if live(who)), key=hits.__getitem__)

    def uncached_tokens(self, worker: WorkerView) -> int:
        """Prompt tokens to compute there."""
        return self._prompt_tokens - self._reused_tokens(worker)

    def computed_tokens(self, worker: WorkerView) -> int:
        """Prompt tokens to compute there after its fetch, if there is one."""
        fetch = self.fetch(worker)
        return self.uncached_tokens(worker) - (fetch.tokens if fetch else 0)

    def fetch(self, worker: WorkerView) -> Fetch | None:
        """The prefix that is cheaper to get from another worker's cache than to compute."""
        holder = next((who for who in self._holders if who != worker.info.id), None)
        if holder is None:
            return None
        block_size = worker.info.layout.block_size
        reachable = min(self._hits[holder], self._prompt_tokens - 1) // block_size * block_size
        tokens = reachable - self._reused_tokens(worker)
        price = self._policy.handoff + self._policy.transfer_per_block * tokens / block_size
        return Fetch(holder, tokens, price) if price < tokens else None

    def missing_blocks(self, worker: WorkerView) -> int:
        """Blocks of the prompt that aren't there."""
        return -(-self.uncached_tokens(worker) // worker.info.layout.block_size)

    def prefill(self, worker: WorkerView) -> tuple[float, ...]:
        """PREFILL_TERMS: to compute the prompt here and send it away."""
        return self._compute(worker)

    def decode(self, worker: WorkerView) -> tuple[float, ...]:
        """DECODE_TERMS: to receive the prompt here and decode it."""
        policy, missing = self._policy, self.missing_blocks(worker)
        transfer = policy.handoff + policy.transfer_per_block * missing
        # A prompt that is being computed here slows the decoding of whoever joins.
        disturbed = policy.harm_per_running * worker.queued_tokens
        return transfer, disturbed, *self._stay(worker, missing)

    def alone(self, worker: WorkerView) -> tuple[float, ...]:
        """ALONE_TERMS: to compute the prompt and decode it in one place."""
        queue, uncached, fetch = self._compute(worker)
        harm = self._policy.harm_per_running * uncached * worker.load.running_requests
        return queue, uncached, fetch, harm, *self._stay(worker, self.missing_blocks(worker))

    def _compute(self, worker: WorkerView) -> tuple[float, float, float]:
        fetch = self.fetch(worker)
        uncached = self.uncached_tokens(worker)
        return worker.queued_tokens, uncached - (fetch.tokens if fetch else 0), fetch.price if fetch else 0.0

    def _stay(self, worker: WorkerView, missing: int) -> tuple[float, float]:
        # One more for the answer's first block. What doesn't fit waits for as many tokens to leave.
        lacking = max(0, missing + 1 - worker.room)
        return self._policy.load_per_request * worker.requests, lacking * worker.info.layout.block_size

    def _reused_tokens(self, worker: WorkerView) -> int:
        """In whole blocks. The block of the last token is always computed: its logits are needed."""
        hit = self._hits.get(worker.info.id, 0)
        if hit < self._prompt_tokens:
            return hit
        block_size = worker.info.layout.block_size
        return (self._prompt_tokens - 1) // block_size * block_size


def option(worker: WorkerView, names: Sequence[str], parts: Sequence[float]) -> Option:
    """The parts of a price with their names."""
    terms = tuple(CostTerm(name, part) for name, part in zip(names, parts, strict=True))
    return Option(worker, terms, sum(parts))
