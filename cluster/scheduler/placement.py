"""Where one request runs: a pure function of the view, the request's shape and the policy.

    remote   a prefill worker computes the prompt, a decode worker receives its KV and decodes
    local    a decode worker does both
    mixed    a worker of the mixed pool does both

Mixed workers also stand in for a prefill or a decode pool that has nobody. The cheapest way wins."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cluster.scheduler.costs import Asked, Estimate, Policy, RequestShape, Rule
from cluster.scheduler.events import RequestPlaced
from cluster.scheduler.native_pricing import fastest_pricing
from diptych.errors import NoWorker, PromptTooLong
from diptych.types import Placement, Prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.scheduler.fleet import Array, Fleet
    from cluster.scheduler.pricing import Costs, Priced
    from cluster.scheduler.view import ClusterView
    from cluster.scheduler.ways import Sides, Way
    from diptych.types import Role, WorkerId


class Considered(NamedTuple):
    """What a decision was made from: its words can be made of it later (`explain`)."""

    placement: Placement
    way: Way
    costs: Costs
    ids: Sequence[WorkerId | None]
    """By slot."""
    hosts: Array
    """By slot, as numbers."""
    how: Rule
    """What the policy left open."""
    prompt_tokens: int
    computed_tokens: int

    @property
    def estimate(self) -> Estimate:
        """Of each worker, by slot."""
        return self.costs.estimate

    @property
    def sides(self) -> Sides:
        """Of ways, by slot."""
        return self.costs.sides


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
    asked = _asked(view, shape, policy, now, rank)
    priced = fastest_pricing()(view.fleet, asked)
    if priced is None:
        raise _refusal(view, shape, policy)
    return _decision(view, shape, asked, priced)


def _asked(view: ClusterView, shape: RequestShape, policy: Policy, now: float, rank: int) -> Asked:
    learning = view.learning
    return Asked(
        prompt_tokens=shape.prompt_tokens,
        context=shape.context,
        answer_tokens=learning.answer_tokens(shape.max_tokens),
        held=view.held_depths(shape.granules),
        promised=view.promised_depths(shape.granules, now),
        rank=rank,
        now=now,
        ttft_seconds=policy.ttft_seconds if shape.ttft_seconds is None else shape.ttft_seconds,
        itl_seconds=policy.itl_seconds if shape.itl_seconds is None else shape.itl_seconds,
        usual_seconds=view.usual.seconds,
        late=learning.late_seconds,
        how=policy.how,
    )


def _decision(view: ClusterView, shape: RequestShape, asked: Asked, priced: Priced) -> Decision:
    ids, fleet, way = view.ids, view.fleet, priced.way
    fetched, decode = int(priced.fetched_tokens), way.decode
    placement = Placement(
        decode=_id(ids, decode),
        prefill=None if way.prefill < 0 else ids[way.prefill],
        how=way.how,
        prefix_from=ids[priced.lender] if fetched else None,
        predicted=_prediction(fleet, asked, priced),
    )
    placed = RequestPlaced(
        at=asked.now,
        request=shape.request,
        placement=placement,
        rank=asked.rank,
        granules=shape.granules,
        tokens=int(priced.uncached_tokens) - fetched,
        seconds=priced.compute_seconds,
        blocks=-int(-priced.lacked_tokens // fleet.block_tokens.item(decode)),
        context_tokens=shape.prompt_tokens + 0.5 * asked.answer_tokens,
    )
    tokens = shape.prompt_tokens, placed.tokens
    return Decision(placement, placed, Considered(placement, way, priced.costs, ids, fleet.host, asked.how, *tokens))


def _id(ids: Sequence[WorkerId | None], slot: int) -> WorkerId:
    id_ = ids[slot]
    assert id_ is not None, f"slot {slot} is vacant and was chosen"
    return id_


def _prediction(fleet: Fleet, asked: Asked, priced: Priced) -> Prediction:
    way = priced.way
    sent_bytes = 0 if way.prefill < 0 else int(priced.lacked_tokens * fleet.token_bytes.item(way.decode))
    return Prediction(
        wait_seconds=priced.wait_seconds,
        ttft_seconds=max(0.0, priced.first_token_seconds + asked.late[way.how]),
        itl_seconds=priced.step_seconds + priced.gap_seconds / max(1.0, asked.answer_tokens - 1.0),
        cached_tokens=int(priced.reused_tokens) + int(priced.fetched_tokens),
        transfer_bytes=sent_bytes,
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
