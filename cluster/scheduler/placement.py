"""Where one request runs: a pure function of the view, the request's shape and the policy.

    remote   a prefill worker computes the prompt, a decode worker receives its KV and decodes
    local    a decode worker does both
    mixed    a worker of the mixed pool does both

Mixed workers also stand in for a prefill or a decode pool that has nobody. The cheapest way wins.
A pair's cost is its two sides' and a transfer's that depends on whether they share a host, so the
best pair is found among the best of each side, over all hosts and on each: no P x D pairs are priced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from cluster.scheduler.costs import Estimate, Policy, RequestShape, Rule, estimate
from cluster.scheduler.events import RequestPlaced
from cluster.scheduler.fleet import FAR, NEAR, Array, Fleet
from cluster.scheduler.rule import compute_cost, decode_cost, harm_cost
from diptych.errors import NoWorker, PromptTooLong
from diptych.types import How, Placement, Prediction

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cluster.scheduler.view import ClusterView
    from diptych.types import Role, WorkerId


class Way(NamedTuple):
    """One way to serve the request, by slots; `prefill` is -1 when `decode` computes the prompt."""

    cost: float
    how: How
    prefill: int
    decode: int

    @property
    def computes(self) -> int:
        """Who computes the prompt."""
        return self.decode if self.prefill < 0 else self.prefill


class Sides(NamedTuple):
    """The costs that ways are made of, by slot; infinite where a worker can't be placed on."""

    prefill: Array
    """Of computing the prompt for another."""
    decode: Array
    """Of receiving and decoding it. Two rows: from the same host, or not."""
    local: Array
    mixed: Array
    late: Mapping[How, float]
    """What each way's first tokens come later than the rest predicts."""


class Considered(NamedTuple):
    """What a decision was made from: its words can be made of it later (`explain`)."""

    placement: Placement
    way: Way
    estimate: Estimate
    sides: Sides
    ids: Sequence[WorkerId | None]
    """By slot."""
    hosts: Array
    """By slot, as numbers."""
    how: Rule
    """What the policy left open."""
    prompt_tokens: int
    computed_tokens: int


class Decision(NamedTuple):
    """The answer, what it adds to the view, and why."""

    placement: Placement
    placed: RequestPlaced
    considered: Considered


def place(view: ClusterView, shape: RequestShape, policy: Policy, now: float, rank: int | None = None) -> Decision:
    """Raises NoWorker when nobody lives who could, PromptTooLong when nobody ever could.

    `rank`: as which it is served, if not as its own.
    """
    rank = shape.rank if rank is None else rank
    fleet, learning = view.fleet, view.learning
    answer_tokens = learning.answer_tokens(shape.max_tokens)
    held, promised = view.held_tokens(shape.granules), view.promised_tokens(shape.granules, now)
    found = estimate(fleet, shape.prompt_tokens, answer_tokens, held, promised, fleet.idle_at[rank], now)
    sides = _sides(view, found, shape, policy)
    way = best_way(sides, fleet, policy)
    if way is None:
        raise _refusal(view, shape, policy)
    return _decision(view, shape, policy.how, rank, found, sides, way, now)


# ---- the ways ----------------------------------------------------------------------------------


def _sides(view: ClusterView, found: Estimate, shape: RequestShape, policy: Policy) -> Sides:
    fleet = view.fleet
    computing = compute_cost(found, shape, policy, view.usual.seconds)
    decoding = decode_cost(found, shape, policy) + fleet.tie
    both = computing + decoding + harm_cost(found)
    senders = fleet.prefill if fleet.placeable["prefill"] else fleet.mixed
    # The mixed pool alone hands nothing over.
    receivers = fleet.mixed if fleet.placeable["prefill"] and not fleet.placeable["decode"] else fleet.decode
    decode, mixed = fleet.decode, fleet.mixed
    if shape.context > fleet.shortest_context:
        senders = senders + _too_long(fleet, shape.prompt_tokens)
        too_long = _too_long(fleet, shape.context)
        receivers, decode, mixed = receivers + too_long, decode + too_long, mixed + too_long
    return Sides(
        prefill=computing + fleet.tie + senders,
        # A prompt that is being computed there holds up whoever joins.
        decode=found.transfer + (decoding + found.wait + receivers),
        local=both + decode,
        mixed=both + mixed if fleet.placeable["mixed"] else mixed,
        late=view.learning.late_seconds,
    )


def _too_long(fleet: Fleet, tokens: int) -> Array:
    return np.where(fleet.most_tokens >= tokens, 0.0, np.inf)


def best_way(sides: Sides, fleet: Fleet, policy: Policy) -> Way | None:
    """The cheapest; of equals, one without a transfer."""
    ways: list[Way] = []
    if policy.how != "remote":
        ways.append(alone(sides, "local", int(sides.local.argmin())))
        if fleet.placeable["mixed"]:
            ways.append(alone(sides, "mixed", int(sides.mixed.argmin())))
    if policy.how != "local":
        ways += _pairs(sides, fleet)
    best = min(ways)
    return best if best.cost < np.inf else None


def alone(sides: Sides, how: Literal["local", "mixed"], slot: int) -> Way:
    """That worker as a way."""
    cost = (sides.local if how == "local" else sides.mixed).item(slot) + sides.late[how]
    return Way(cost, how, -1, slot)


def _pairs(sides: Sides, fleet: Fleet) -> list[Way]:
    """The best pair that shares a host and the best that doesn't; without the one that can't be better."""
    prefill, decode = int(sides.prefill.argmin()), int(sides.decode[FAR].argmin())
    best, late = pair(sides, fleet.host, prefill, decode), sides.late["remote"]
    if fleet.host[prefill] != fleet.host[decode]:
        bound = late + sides.prefill[prefill] + sides.decode[NEAR, int(sides.decode[NEAR].argmin())]
        return [best] if best.cost <= bound else [best, *_near(sides, fleet, prefill)]
    near = list(_near(sides, fleet, prefill))
    if near and near[0].cost <= late + sides.prefill[prefill] + sides.decode[FAR, decode]:
        return near
    # One of the two is in the best pair across hosts, the other is the best of all other hosts.
    elsewhere = np.where(fleet.host == fleet.host[prefill], np.inf, 0.0)
    other_decode = int((sides.decode[FAR] + elsewhere).argmin())
    other_prefill = int((sides.prefill + elsewhere).argmin())
    return [
        best,
        *near,
        pair(sides, fleet.host, prefill, other_decode),
        pair(sides, fleet.host, other_prefill, decode),
    ]


def _near(sides: Sides, fleet: Fleet, prefill: int) -> Iterator[Way]:
    """The best pair on one host; `prefill` is the best of all."""
    order, starts = fleet.by_host
    if len(starts) == 1:
        yield pair(sides, fleet.host, prefill, int(sides.decode[NEAR].argmin()))
    elif len(starts) < len(order):
        senders, receivers = sides.prefill[order], sides.decode[NEAR][order]
        host = int((np.minimum.reduceat(senders, starts) + np.minimum.reduceat(receivers, starts)).argmin())
        there = slice(int(starts[host]), int(starts[host + 1]) if host + 1 < len(starts) else len(order))
        sender, receiver = int(senders[there].argmin()), int(receivers[there].argmin())
        yield pair(sides, fleet.host, int(order[there][sender]), int(order[there][receiver]))


def pair(sides: Sides, hosts: Array, prefill: int, decode: int) -> Way:
    """That pair as a way."""
    kind = NEAR if hosts.item(prefill) == hosts.item(decode) else FAR
    cost = sides.prefill.item(prefill) + sides.decode.item(kind, decode) + sides.late["remote"]
    return Way(cost, "remote", prefill, decode)


def _decision(
    view: ClusterView, shape: RequestShape, how: Rule, rank: int, found: Estimate, sides: Sides, way: Way, now: float
) -> Decision:
    ids, fleet, computes, decode = view.ids, view.fleet, way.computes, way.decode
    prefill = None if way.prefill < 0 else ids[way.prefill]
    fetched = 0 if found.fetched_tokens is None else int(found.fetched_tokens.item(computes))
    placement = Placement(
        decode=_id(ids, decode),
        prefill=prefill,
        how=way.how,
        prefix_from=ids[found.holder_for(computes)] if fetched else None,
        predicted=_prediction(fleet, found, way, fetched, sides.late[way.how]),
    )
    placed = RequestPlaced(
        at=now,
        request=shape.request,
        placement=placement,
        rank=rank,
        granules=shape.granules,
        tokens=int(found.missing_tokens.item(computes)) - fetched,
        seconds=found.compute.item(computes),
        blocks=-int(-found.missing_tokens.item(decode) // fleet.block_tokens.item(decode)),
        context_tokens=shape.prompt_tokens + 0.5 * found.answer_tokens,
    )
    considered = Considered(placement, way, found, sides, ids, fleet.host, how, shape.prompt_tokens, placed.tokens)
    return Decision(placement, placed, considered)


def _id(ids: Sequence[WorkerId | None], slot: int) -> WorkerId:
    id_ = ids[slot]
    assert id_ is not None, f"slot {slot} is vacant and was chosen"
    return id_


def _prediction(fleet: Fleet, found: Estimate, way: Way, fetched: int, residual_seconds: float) -> Prediction:
    computes, decode = way.computes, way.decode
    sent = way.prefill >= 0
    kind = NEAR if fleet.host.item(computes) == fleet.host.item(decode) else FAR
    gap = found.transfer.item(kind, decode) if sent else 0.0
    if found.room is not None:
        gap += found.room.item(decode)
    return Prediction(
        wait_seconds=found.wait.item(computes),
        ttft_seconds=max(0.0, found.first_token.item(computes) + residual_seconds),
        itl_seconds=found.step.item(decode) + gap / max(1.0, found.answer_tokens - 1.0),
        cached_tokens=int(found.reused_tokens.item(computes)) + fetched,
        transfer_bytes=int(found.missing_tokens.item(decode) * fleet.token_bytes.item(decode)) if sent else 0,
    )


# ---- refusals ------------------------------------------------------------------------------------


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
