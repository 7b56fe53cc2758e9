"""Decision records as protobuf messages. Knows shapes only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.front.grpc_messages import served_of
from diptych.v1.admin_pb2 import Candidate, CostTerm, ExplainResponse, Explanation, Outcome, PlacedAt, Prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diptych import types


def explained(explanations: Sequence[types.Explanation]) -> ExplainResponse:
    """One for each choice."""
    return ExplainResponse(explanations=[_explanation(each) for each in explanations])


def _explanation(told: types.Explanation) -> Explanation:
    return Explanation(
        request_id=told.request,
        tenant=told.tenant,
        priority=told.priority,
        prompt_tokens=told.prompt_tokens,
        max_tokens=told.max_tokens,
        wished_ttft_seconds=told.ttft_seconds,
        wished_itl_seconds=told.itl_seconds,
        deadline_seconds=told.deadline_seconds,
        age_seconds=told.age_seconds,
        placements=[_placed(each) for each in told.placements],
        refusal=told.refusal,
        outcome=_outcome(told.outcome) if told.outcome else None,
        ended_seconds=told.ended_seconds,
    )


def _placed(placed: types.PlacedAt) -> PlacedAt:
    placement, predicted = placed.placement, placed.placement.predicted
    return PlacedAt(
        seconds=placed.seconds,
        how=placement.how,
        prefill_worker=placement.prefill or "",
        decode_worker=placement.decode,
        prefix_from=placement.prefix_from or "",
        reason=placement.reason,
        candidates=[_candidate(each) for each in placement.candidates],
        predicted=Prediction(**predicted._asdict()) if predicted else None,
    )


def _candidate(candidate: types.Candidate) -> Candidate:
    return Candidate(
        how=candidate.how,
        prefill_worker=candidate.prefill or "",
        decode_worker=candidate.decode,
        cost_seconds=candidate.cost,
        terms=[CostTerm(name=term.name, seconds=term.value) for term in candidate.terms],
    )


def _outcome(outcome: types.Outcome) -> Outcome:
    served = outcome.served
    return Outcome(
        queue_seconds=outcome.queue_seconds,
        ttft_seconds=outcome.ttft_seconds,
        itl_seconds=outcome.itl_seconds,
        tokens=outcome.tokens,
        served=served_of(served) if served else None,
        error=outcome.error,
    )
