"""Placement alone: instances that compute prompts at one rate over the real block pool; decode is not modelled.

Each prompt is placed as it arrives, in the order of the trace, with all instances' state known. A hit is the run of
leading blocks that the chosen instance has; the last block counts though it may be partial. A prompt's delay is the
queue it finds and its own uncached tokens, over the rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from cluster.scheduler.costs import RequestShape
from cluster.simulate.asked import block_name, granule_names
from cluster.simulate.fleet import make_info
from cluster.simulate.summary import percentile
from diptych.types import Counters, Load, Outcome, Report, RequestId, StepSample, Stored, TransferSample, WorkerId
from workers.engine.blocks import BlockPool

if TYPE_CHECKING:
    from cluster.simulate.constants import Constants, Placement
    from cluster.simulate.policy import Policy
    from cluster.simulate.trace import Trace, TraceRequest
    from diptych.types import BlockHash, Eviction, WorkerInfo

_NEVER_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What a policy made of a trace."""

    policy: str
    weights: str
    hit_rate: float
    """Share of all blocks."""
    imbalance: float
    """Uncached tokens, most of an instance over mean."""
    delay_p50: float
    """Seconds."""
    delay_p99: float


class Instance:
    """One queue over one pool."""

    def __init__(self, info: WorkerInfo, peer: WorkerId, tokens_per_second: float, eviction: Eviction) -> None:
        self.info = info
        self.pool = BlockPool(info.blocks, eviction=eviction)
        self.queued_tokens = 0.0
        self.work = 0
        self._rate = tokens_per_second
        self._drained = 0.0
        self._told = 0
        # There are no links between instances: a scheduler that lends prefixes must learn that it doesn't pay.
        self._no_links = tuple(
            TransferSample(peer, "gloo", nbytes, _NEVER_SECONDS, _NEVER_SECONDS) for nbytes in (1 << 20, 1 << 24)
        )

    def drain(self, now: float) -> float:
        """Compute until now; how many tokens."""
        done = min(self.queued_tokens, (now - self._drained) * self._rate)
        self.queued_tokens -= done
        self._drained = now
        return done

    def serve(self, names: tuple[BlockHash, ...], uncached_tokens: int, request: str) -> None:
        """Queue a prompt and cache it whole, its tail to be evicted first."""
        self.queued_tokens += uncached_tokens
        self.work += uncached_tokens
        pool = self.pool
        here = pool.acquire(names, request)
        new = pool.take(len(names) - len(here), request)
        assert new is not None, f"a prompt of {len(names)} blocks in an instance of {pool.size}"
        for block, name in zip(new, names[len(here) :], strict=True):
            pool.name(block, name, request)
        pool.release(request)

    def report(self, computed: float) -> Report:
        """All that changed since the last one."""
        number, self._told = self._told, self._told + 1
        events = tuple(self.pool.events())
        sample = StepSample(1, computed, 0.0, 0.0, 0.0, computed / self._rate)
        return Report(
            worker=self.info.id,
            epoch=self.info.epoch,
            number=number,
            load=Load(
                waiting_requests=int(self.queued_tokens > 0),
                waiting_tokens=round(self.queued_tokens),
                blocks_free=self.pool.free,
                blocks_cached=self.pool.cached,
            ),
            counters=Counters(),
            events=events if number else (Stored(()),),
            full=not number,
            steps=(sample,) if computed else (),
            transfers=() if number else self._no_links,
        )


def place_all(trace: Trace, constants: Constants, policy: Policy, eviction: Eviction = "lru") -> Placed:
    """The whole trace, as recorded: placement has no use for more speed."""
    placement = constants.placement
    room = constants.model_copy(update={"kv_tokens_per_worker": placement.blocks * trace.block_tokens})
    ids = [WorkerId(f"mixed-{each}") for each in range(placement.instances)]
    instances = [
        Instance(make_info(one, "mixed", room, trace.block_tokens), other, placement.tokens_per_second, eviction)
        for one, other in zip(ids, (*ids[1:], ids[0]), strict=True)
    ]
    for instance in instances:
        policy.join(instance.info, 0.0)
    by_id = {instance.info.id: instance for instance in instances}
    ending: list[tuple[float, RequestId, float]] = []
    hits, delays = 0, list[float]()
    for place, one in enumerate(trace.requests):
        while ending and ending[0][0] <= one.arrival:
            _, request, delay = heappop(ending)
            policy.finished(_outcome(request, delay), one.arrival)
        for instance in instances:
            policy.report(instance.report(instance.drain(one.arrival)), one.arrival)
        names = tuple(block_name(block) for block in one.blocks)
        shape = _shape(place, one, names, trace.block_tokens)
        chosen = policy.submit(shape, one.arrival)
        assert chosen is not None, f"{policy.name} lets {shape.request} wait: place it at once"
        instance = by_id[chosen.decode]
        lead = instance.pool.match(names)
        hits += lead
        instance.serve(names, max(0, one.prompt_tokens - lead * trace.block_tokens), shape.request)
        delay = instance.queued_tokens / placement.tokens_per_second
        delays.append(delay)
        heappush(ending, (one.arrival + delay, shape.request, delay))
    for instance in instances:
        instance.pool.check()
    work = [instance.work for instance in instances]
    delays.sort()
    return Placed(
        policy=policy.name if eviction == "lru" else f"{policy.name} + {eviction}",
        weights=policy.weights,
        hit_rate=hits / sum(len(one.blocks) for one in trace.requests),
        imbalance=max(work) * len(work) / sum(work),
        delay_p50=percentile(delays, 50),
        delay_p99=percentile(delays, 99),
    )


def pooled(constants: Constants) -> Constants:
    """One instance with the room and the rate of all: a bound, not a policy."""
    one = constants.placement
    whole: Placement = one.model_copy(
        update={
            "instances": 1,
            "blocks": one.blocks * one.instances,
            "tokens_per_second": one.tokens_per_second * one.instances,
        }
    )
    return constants.model_copy(update={"placement": whole})


def bound(trace: Trace, constants: Constants, blind: Policy) -> Placed:
    """`pooled`, with the pool's own eviction; any policy will do."""
    return replace(place_all(trace, pooled(constants), blind), policy="pooled (bound)", weights="")


def _shape(place: int, one: TraceRequest, names: tuple[BlockHash, ...], block_tokens: int) -> RequestShape:
    granules = tuple(granule_names(names, block_tokens))
    return RequestShape(
        request=RequestId(f"r{place}"), granules=granules, prompt_tokens=one.prompt_tokens, max_tokens=1
    )


def _outcome(request: RequestId, delay: float) -> Outcome:
    return Outcome(request=request, queue_seconds=0.0, ttft_seconds=delay, itl_seconds=None, tokens=1, served=None)
