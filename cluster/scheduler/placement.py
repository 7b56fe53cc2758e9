"""Where one request runs: a pure function of the view, the request's shape and the policy.

    remote   a prefill worker computes the prompt, a decode worker receives its KV and decodes
    local    a decode worker does both
    mixed    a worker of the mixed pool does both

Mixed workers also stand in for a prefill or a decode pool that has nobody. The cheapest way wins.
A pair's cost is the sum of its two sides' costs, so the best pair is the best of each side:
P + D workers are priced, not P x D pairs, and the few best of each side make the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nsmallest
from itertools import product
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from cluster.scheduler.costs import (
    ALONE_TERMS,
    DECODE_TERMS,
    PREFILL_TERMS,
    Costs,
    Option,
    Policy,
    Price,
    RequestShape,
    option,
)
from cluster.scheduler.view import RequestPlaced
from diptych.errors import NoWorker, PromptTooLong
from diptych.types import Candidate, How, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.scheduler.view import ClusterView, WorkerView
    from diptych.types import Role

_RECORDED = 8
_BEST_OF_A_SIDE = 3


class Decision(NamedTuple):
    """The answer, and what it adds to the view until its workers report."""

    placement: Placement
    placed: RequestPlaced


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """One way to serve the request; `prefill` is None when `decode` computes the prompt."""

    how: How
    prefill: Option | None
    decode: Option

    @property
    def cost(self) -> float:
        return self.decode.cost + (self.prefill.cost if self.prefill else 0.0)

    @property
    def computes(self) -> WorkerView:
        """Who computes the prompt."""
        return (self.prefill or self.decode).worker

    @property
    def workers(self) -> str:
        if self.prefill:
            return f"{self.prefill.worker.info.id} with {self.decode.worker.info.id}"
        return f"{self.decode.worker.info.id} alone"

    def candidate(self) -> Candidate:
        return Candidate(
            prefill=self.prefill.worker.info.id if self.prefill else None,
            decode=self.decode.worker.info.id,
            how=self.how,
            terms=(*(self.prefill.terms if self.prefill else ()), *self.decode.terms),
        )


def place(view: ClusterView, shape: RequestShape, policy: Policy) -> Decision:
    """Raises NoWorker when nobody lives who could, PromptTooLong when nobody ever could."""
    costs = Costs(shape, policy, view.longest_prefix(shape.granules), lambda who: not view.workers[who].stale)
    ways = sorted(_ways(view, shape, policy, costs), key=attrgetter("cost"))[:_RECORDED]
    best = ways[0]
    fetch = costs.fetch(best.computes)
    placement = Placement(
        decode=best.decode.worker.info.id,
        prefill=best.prefill.worker.info.id if best.prefill else None,
        how=best.how,
        reason=_reason(ways, shape, policy, costs),
        candidates=tuple(way.candidate() for way in ways),
        prefix_from=fetch.holder if fetch else None,
    )
    placed = RequestPlaced(
        computes=best.computes.info.id,
        tokens=costs.computed_tokens(best.computes),
        decodes=placement.decode,
        blocks=costs.missing_blocks(best.decode.worker),
    )
    return Decision(placement, placed)


# ---- the ways ----------------------------------------------------------------------------------


def _ways(view: ClusterView, shape: RequestShape, policy: Policy, costs: Costs) -> list[_Way]:
    """At least one. Of ways that cost the same the first is taken, so those without a transfer lead."""
    prefill = _large_enough(view.pool("prefill"), shape.prompt_tokens)
    decode = _large_enough(view.pool("decode"), shape.context)
    mixed = _large_enough(view.pool("mixed"), shape.context)
    turn = view.requests_placed
    ways: list[_Way] = []
    if policy.how != "remote":
        apart, both = (_shortlist(pool, costs.alone, ALONE_TERMS, turn) for pool in (decode, mixed))
        ways += [_Way(how="local", prefill=None, decode=one) for one in apart]
        ways += [_Way(how="mixed", prefill=None, decode=one) for one in both]
    if policy.how != "local" and (prefill or decode):
        senders = _shortlist(prefill or mixed, costs.prefill, PREFILL_TERMS, turn)
        receivers = _shortlist(decode or mixed, costs.decode, DECODE_TERMS, turn)
        ways += [_Way(how="remote", prefill=p, decode=d) for p, d in product(senders, receivers)]
    if not ways:
        raise _refusal(view, shape, policy)
    return ways


def _large_enough(workers: Sequence[WorkerView], tokens: int) -> list[WorkerView]:
    return [worker for worker in workers if worker.info.max_context >= tokens]


def _shortlist(workers: Sequence[WorkerView], price: Price, names: Sequence[str], turn: int) -> list[Option]:
    """The cheapest few; equals by fewest requests, then in turn, so that ties spread."""
    count = len(workers)
    ranked = nsmallest(
        _BEST_OF_A_SIDE,
        [
            (sum(parts := price(worker)), worker.requests, (place - turn) % count, place, parts)
            for place, worker in enumerate(workers)
        ],
    )
    return [option(workers[place], names, parts) for *_, place, parts in ranked]


# ---- in words ----------------------------------------------------------------------------------


def _reason(ways: Sequence[_Way], shape: RequestShape, policy: Policy, costs: Costs) -> str:
    best = ways[0]
    told = (
        f"{best.computes.info.id} computes {costs.computed_tokens(best.computes):,} of {shape.prompt_tokens:,} prompt "
        f"tokens behind {best.computes.queued_tokens:,} queued"
    )
    if fetch := costs.fetch(best.computes):
        told += f", after fetching {fetch.tokens:,} from {fetch.holder}'s cache,"
    if best.prefill:
        receiver = best.decode.worker
        missing = costs.missing_blocks(receiver)
        told += f" and sends {receiver.info.id} the {missing:,} KV block{'s' if missing > 1 else ''} it lacks"
    else:
        told += f" and decodes beside {best.computes.load.running_requests:,} running requests"
    if policy.how != "auto":
        told += f", as placement.how = {policy.how} demands"
    price = f"this costs about as much as computing {best.cost:,.0f} tokens"
    if len(ways) == 1:
        return f"{told}: {price}, and there was no other way"
    return f"{told}: {price}; the next best ({ways[1].how}, {ways[1].workers}) {ways[1].cost:,.0f}"


def _refusal(view: ClusterView, shape: RequestShape, policy: Policy) -> NoWorker | PromptTooLong:
    """Why there is no way at all, with the numbers and the way out."""
    live = [worker for worker in view.workers.values() if not worker.stale]
    largest = max((worker.info.max_context for worker in live if worker.info.role != "prefill"), default=None)
    if largest is not None and largest < shape.context:
        return PromptTooLong(
            f"{shape.prompt_tokens:,} prompt tokens and an answer of {shape.max_tokens:,} are {shape.context:,} "
            f"tokens, the largest worker holds {largest:,}: shorten either"
        )
    wanted = {"auto": "decode or mixed worker", "local": "decode or mixed worker", "remote": "pair of workers"}
    counts = ", ".join(f"{_live_of(view, role)} {role}" for role in ("prefill", "decode", "mixed"))
    way_out = ": start what is missing or set placement.how = auto" if policy.how == "remote" else ""
    return NoWorker(f"no {wanted[policy.how]} can take {shape.request}; live workers: {counts}{way_out}")


def _live_of(view: ClusterView, role: Role) -> str:
    joined = sum(worker.info.role == role for worker in view.workers.values())
    return f"{len(view.pool(role))} of {joined}"
