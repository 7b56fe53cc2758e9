"""Records of decisions: found by the caller's id, bounded, and held to what came about."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.scheduler.costs import RequestShape
from cluster.scheduler.records import Records
from diptych.errors import NoWorker, UnknownRequest
from diptych.types import (
    TTFT_ERROR_BOUNDS,
    BlockHash,
    Candidate,
    CostTerm,
    Outcome,
    Placement,
    Prediction,
    RequestId,
    Served,
    WorkerId,
)

P, D = WorkerId("p"), WorkerId("d")
CANDIDATE = Candidate(prefill=P, decode=D, how="remote", terms=(CostTerm("queue", 0.5), CostTerm("prefill", 1.5)))
PLACEMENT = Placement(
    decode=D,
    prefill=P,
    how="remote",
    reason="it is cheapest",
    candidates=(CANDIDATE,),
    predicted=Prediction(wait_seconds=0.5, ttft_seconds=2.0, itl_seconds=0.1, cached_tokens=64, transfer_bytes=100),
)


def shape(name: str) -> RequestShape:
    return RequestShape(
        request=RequestId(name),
        granules=(BlockHash(b"x" * 32),),
        prompt_tokens=80,
        max_tokens=9,
        tenant="t",
        ttft_seconds=3.0,
    )


def outcome(
    name: str, ttft: float | None = 2.5, itl: float | None = 0.2, *, cached: int = 64, how: str = "remote"
) -> Outcome:
    served = Served(how=how, prefill_worker="p", decode_worker="d", prompt_tokens_computed=0, cached_tokens=cached)
    return Outcome(RequestId(name), 1.0, ttft, itl, 6, served)


def test_a_record_tells_what_was_asked_where_it_ran_and_how_it_went() -> None:
    records = Records()
    records.asked(shape("r~aa"), now=10.0)
    records.placed(shape("r~aa"), PLACEMENT, now=11.0)
    records.finished(outcome("r~aa"), now=15.0)
    [told] = records.explain("r~aa", now=20.0)
    assert (told.prompt_tokens, told.max_tokens, told.tenant, told.ttft_seconds) == (80, 9, "t", 3.0)
    [placed] = told.placements
    assert (placed.placement, placed.seconds) == (PLACEMENT, 1.0)
    assert told.outcome == outcome("r~aa")
    # Placed after 1 s, first token 2.5 s later, five more 0.2 s apart: not when the word of it came.
    assert (told.age_seconds, told.ended_seconds) == (10.0, pytest.approx(4.5))


def test_a_callers_id_finds_all_its_choices_and_nobody_elses() -> None:
    records = Records()
    for name in ("r~aa", "r-1~0b", "r-0~0a", "r-0~0a-2~ff", "rr~aa", "r-0", "r-x~aa"):
        records.asked(shape(name), now=0.0)

    def found(name: str) -> list[str]:
        return [told.request for told in records.explain(name, now=1.0)]

    assert found("r") == ["r~aa", "r-1~0b", "r-0~0a"]
    assert found("rr") == ["rr~aa"]
    assert found("r-0") == ["r-0~0a", "r-0"]
    with pytest.raises(UnknownRequest, match=r"no record of 'r\.': the last 4,096 requests are kept, 7 are here"):
        records.explain("r.", now=1.0)


def test_the_ring_forgets_the_oldest() -> None:
    records = Records(size=3)
    for number in range(10):
        records.placed(shape(f"r{number}"), PLACEMENT, now=0.0)
    assert len(records) == 3
    assert records.explain("r7", now=0.0)
    with pytest.raises(UnknownRequest, match="last 3 requests"):
        records.explain("r6", now=0.0)
    records.finished(outcome("r6"), now=0.0)
    assert records.accuracy.outcomes == 0


def test_a_request_placed_again_keeps_both_placements_and_is_held_to_the_last() -> None:
    records = Records()
    records.placed(shape("r"), PLACEMENT, now=1.0)
    second = replace(PLACEMENT, predicted=Prediction(0.0, 2.5, 0.2, 64, 0))
    records.placed(shape("r"), second, now=3.0)
    records.finished(outcome("r"), now=9.0)
    [told] = records.explain("r", now=9.0)
    assert [placed.seconds for placed in told.placements] == [0.0, 2.0]
    assert records.accuracy.ttft_error_seconds == 0.0


def test_a_refusal_is_kept_with_its_words() -> None:
    records = Records()
    records.asked(shape("r"), now=1.0)
    records.refused(RequestId("r"), NoWorker("no pair of workers"), now=1.5)
    [told] = records.explain("r", now=2.0)
    assert (told.refusal, told.placements, told.ended_seconds) == ("NoWorker: no pair of workers", (), 0.5)


def test_predictions_are_held_against_what_came_about() -> None:
    records = Records()
    for name, ended in (
        ("exact", outcome("exact", 2.0, 0.1)),
        ("slower", outcome("slower", 2.5, 0.2, cached=0)),
        ("faster", outcome("faster", 1.0, None, cached=80)),
        ("recovered", outcome("recovered", 10.0, None, cached=0, how="local")),
        ("silent", outcome("silent", None, None)),
        ("unforeseen", outcome("unforeseen")),
    ):
        predicted = PLACEMENT if name != "unforeseen" else replace(PLACEMENT, predicted=None)
        records.placed(shape(name), predicted, now=0.0)
        records.finished(ended, now=1.0)
        records.finished(ended, now=2.0)  # said twice
    accuracy = records.accuracy
    assert (accuracy.outcomes, accuracy.itl_outcomes, accuracy.hit_outcomes) == (4, 2, 3)
    assert accuracy.predicted_ttft_seconds == 8.0
    assert accuracy.actual_ttft_seconds == 15.5
    assert accuracy.ttft_error_seconds == 0.5 + 1.0 + 8.0
    assert accuracy.itl_error_seconds == pytest.approx(0.1)
    # Errors of 0, 20 %, 100 % and 80 %.
    assert TTFT_ERROR_BOUNDS == (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
    assert accuracy.ttft_errors == (1, 0, 1, 0, 0, 2, 0, 0)
    assert (accuracy.predicted_hit_tokens, accuracy.actual_hit_tokens) == (192, 144)
    assert (accuracy.hits_missed_tokens, accuracy.hits_unforeseen_tokens) == (64, 16)
