"""Readers of public traces: each format as it is published, and errors that name the line and the way out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cluster.simulate.readers import read_trace
from cluster.simulate.trace import TraceError

if TYPE_CHECKING:
    from pathlib import Path

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def written(folder: Path, text: str) -> str:
    file = folder / "trace"
    file.write_text(text)
    return str(file)


def mooncake(at: int, prompt: int, output: int, *ids: int) -> str:
    told = {"timestamp": at, "input_length": prompt, "output_length": output, "hash_ids": ids}
    return json.dumps(told) + "\n"


def test_mooncake_counts_milliseconds_from_the_first_request(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, mooncake(5000, 700, 9, 1, 2) + mooncake(6500, 512, 1, 1)))
    assert trace.block_tokens == 512
    assert [(one.arrival, one.prompt_tokens, one.output_tokens, one.blocks) for one in trace.requests] == [
        (0.0, 700, 9, (1, 2)),
        (1.5, 512, 1, (1,)),
    ]


def test_mooncake_of_another_block_size_is_read_when_told(tmp_path: Path) -> None:
    source = written(tmp_path, mooncake(0, 700, 9, *range(11)))
    with pytest.raises(TraceError, match=r":1: 11 hash_ids for 700 tokens; .* would be 2: .*--block-tokens"):
        read_trace(source)
    assert read_trace(source, block_tokens=64).requests[0].blocks == tuple(range(11))


def test_the_next_turn_names_the_blocks_of_the_answer(tmp_path: Path) -> None:
    first, stranger = mooncake(0, 1100, 600, 0, 1, 2), mooncake(1, 1100, 600, 0, 7, 8)
    second = mooncake(9000, 2100, 5, 0, 1, 3, 4, 5)
    trace = read_trace(written(tmp_path, first + stranger + second))
    assert [one.answer_blocks for one in trace.requests] == [(3,), (), ()]


def test_bailian_counts_seconds_in_blocks_of_16_and_knows_its_parents(tmp_path: Path) -> None:
    lines = [
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.5, "input_length": 40, "output_length": 30,
         "type": "text", "turn": 1, "hash_ids": [1, 2, 3]},
        {"chat_id": 2, "parent_chat_id": 1, "timestamp": 63.0, "input_length": 96, "output_length": 8,
         "type": "text", "turn": 2, "hash_ids": [1, 2, 4, 5, 6, 7]},
    ]  # fmt: skip
    trace = read_trace(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert trace.block_tokens == 16
    assert [one.arrival for one in trace.requests] == [0.0, 1.5]
    assert trace.requests[0].answer_blocks == (4, 5)


@pytest.mark.parametrize(
    "times",
    [
        ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.4799600"),
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00.509930+00:00"),
    ],
)
def test_azure_of_both_years_becomes_prompts_that_share_nothing(tmp_path: Path, times: tuple[str, str]) -> None:
    rows = "".join(f"{at},1000,{10 + place}\n" for place, at in enumerate(times))
    trace = read_trace(written(tmp_path, AZURE + rows))
    assert [one.arrival for one in trace.requests] == pytest.approx([0.0, 0.5])
    assert [one.output_tokens for one in trace.requests] == [10, 11]
    first, second = (set(one.blocks) for one in trace.requests)
    assert len(first) == len(second) == 2
    assert not first & second


def test_burstgpt_leaves_failed_requests_out_and_says_so(tmp_path: Path) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n9,GPT-4,100,0,100,API log\n45,GPT-4,87,230,317,API log\n"
    trace = read_trace(written(tmp_path, BURSTGPT + rows))
    assert [(one.arrival, one.prompt_tokens, one.output_tokens) for one in trace.requests] == [
        (0.0, 472, 18),
        (40.0, 87, 230),
    ]
    assert any("1 requests without an answer" in note for note in trace.notes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("when,what\n1,2\n", r":1: neither JSON nor columns of Azure .* or BurstGPT"),
        (AZURE, "has no request"),
        (AZURE + "2023-11-16 18:17:03,12\n", r":2: 2 columns under a header of 3"),
        (AZURE + "2023-11-16 18:17:03,12,3\nyesterday,12,3\n", r":3: Invalid isoformat string: 'yesterday'"),
        (AZURE + "2023-11-16 18:17:03,-12,3\n", r":2: -12 prompt tokens"),
        (mooncake(0, 5, 5, 1) + "{not json\n", r":2: .*Invalid JSON"),
        (mooncake(0, 5, 5, 1) + "[]\n", r":2: "),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5}\n', r":1: hash_ids: Field required"),
        ('{"timestamp": 0, "input_length": "5", "output_length": 5, "hash_ids": [1]}\n', r":1: input_length: "),
        (mooncake(0, -5, 5, 1), r":1: input_length: .*greater than or equal to 0"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(TraceError, match=told):
        read_trace(written(tmp_path, text))


def test_a_missing_file_is_an_error_with_its_name() -> None:
    with pytest.raises(TraceError, match=r"nowhere\.jsonl can't be read: .*No such file"):
        read_trace("nowhere.jsonl")
    with pytest.raises(TraceError, match="single-turn:512"):
        read_trace("single-turn:many")


def test_rounded_arrivals_are_spread_inside_their_bin_and_keep_their_order(tmp_path: Path) -> None:
    """Of 3 s, give or take a millisecond, as Mooncake's are."""
    times = [3000 * (place // 10) - place // 10 % 2 for place in range(200)]
    lines = "".join(mooncake(at, 600, 5, place, 1000 + place) for place, at in enumerate(times))
    trace = read_trace(written(tmp_path, lines))
    spread = trace.spread(seed=0)
    arrivals = [one.arrival for one in spread.requests]
    assert arrivals == sorted(arrivals)
    assert {one.blocks for one in spread.requests} == {one.blocks for one in trace.requests}
    inside = [at % 3.0 for at in arrivals]
    assert 1.2 < sum(inside) / len(inside) < 1.8
    assert spread == trace.spread(seed=0) != trace.spread(seed=1)


def test_exact_arrivals_stay_as_they_are(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:17:{second:02}.{37 * second:06},10,10\n" for second in range(30))
    trace = read_trace(written(tmp_path, AZURE + rows))
    assert trace.spread(seed=0) is trace
