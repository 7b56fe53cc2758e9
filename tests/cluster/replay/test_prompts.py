"""Tokens for a trace: what it shares is shared, what it continues is continued, and nothing else."""

from __future__ import annotations

import pytest

from cluster.replay.prompts import fitting, shrunk, wanted_of
from cluster.simulate.trace import Trace, TraceError, TraceRequest, with_answers


def request(arrival: float, prompt: int, output: int, *blocks: int) -> TraceRequest:
    return TraceRequest(arrival=arrival, prompt_tokens=prompt, output_tokens=output, blocks=blocks)


TRACE = Trace(
    name="t",
    block_tokens=64,
    requests=(
        request(0.0, 200, 100, 1, 2, 3, 4),
        request(1.0, 200, 30, 1, 2, 5, 6),
        # Goes on after the first: what it says of blocks 7 … 9 is the end of its prompt, its answer, and more.
        request(2.0, 400, 10, 1, 2, 3, 7, 8, 9, 10),
    ),
)


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_equal_blocks_are_equal_tokens_and_others_are_not() -> None:
    wanted = [wanted_of(TRACE, each, at) for at, each in enumerate(TRACE.requests)]
    assert [(len(each.prompt), len(each.answer)) for each in wanted] == [(200, 100), (200, 30), (400, 10)]
    assert shared(wanted[0].prompt, wanted[1].prompt) == 128
    assert wanted == [wanted_of(TRACE, each, at) for at, each in enumerate(TRACE.requests)]
    assert all(32 <= token < 256 for each in wanted for token in (*each.prompt, *each.answer))


@pytest.mark.parametrize("factor", [1, 4])
def test_a_next_turn_begins_with_what_was_asked_and_answered(factor: int) -> None:
    trace = shrunk(with_answers(TRACE), factor)
    first, _, third = (wanted_of(trace, each, at) for at, each in enumerate(trace.requests))
    said = (*first.prompt, *first.answer)
    whole = len(said) // trace.block_tokens * trace.block_tokens
    assert whole > len(first.prompt)
    assert shared(said, third.prompt) >= whole


def test_a_shorter_trace_shares_as_much_as_before() -> None:
    short = shrunk(TRACE, 8)
    assert short.block_tokens == 8
    first, second, _ = (wanted_of(short, each, at) for at, each in enumerate(short.requests))
    assert (len(first.prompt), len(first.answer)) == (25, 12)
    assert shared(first.prompt, second.prompt) == 16
    with pytest.raises(TraceError, match="blocks of 64 tokens can't be 3 times shorter"):
        shrunk(TRACE, 3)


def test_what_no_worker_holds_is_left_out_and_said() -> None:
    kept = fitting(TRACE, 300)
    assert [one.prompt_tokens for one in kept.requests] == [200, 200]
    assert kept.notes == ("1 requests longer than 300 tokens left out",)
    with pytest.raises(TraceError, match="no request of t fits into the 50 tokens of this model: use --shrink"):
        fitting(TRACE, 50)
