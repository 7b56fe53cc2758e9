"""From a trace's file to a `Trace`. Knows formats, no simulation.

    Mooncake   JSONL  timestamp [ms], input_length, output_length, hash_ids of 512-token blocks
    Bailian    JSONL  chat_id, parent_chat_id, timestamp [s], input_length, output_length, hash_ids of 16-token blocks
    Azure      CSV    TIMESTAMP, ContextTokens, GeneratedTokens (2023 and 2024)
    BurstGPT   CSV    Timestamp [s], Request tokens, Response tokens; a response of 0 tokens is a failed request

Traces without hashes get prompts that share nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from cluster.simulate.made import MADE, made_trace
from cluster.simulate.trace import Trace, TraceError, TraceRequest, unique_blocks, with_answers, with_told_turns

MOONCAKE_BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16


def read_trace(source: str, *, block_tokens: int | None = None) -> Trace:
    """The trace in that file, whatever its format; `block_tokens` None takes the format's own.

    Raises TraceError, which names the file, the line and the way out.
    """
    if source.startswith(MADE):
        return made_trace(source, block_tokens or MOONCAKE_BLOCK_TOKENS)
    file = Path(source)
    first = _first_line(file)
    trace = _jsonl(file, first, block_tokens) if first.startswith("{") else _csv(file, first, block_tokens)
    if not trace.requests:
        raise TraceError(f"{source} has no request that was answered")
    return trace


def _first_line(file: Path) -> str:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            first = lines.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{file} can't be read: {error}") from error
    if not first:
        raise TraceError(f"{file} is empty, or its first line is")
    return first


@contextmanager
def _line(file: Path, number: int) -> Generator[None]:
    """What is wrong inside is told with the place."""
    try:
        yield
    except ValidationError as error:
        [first, *_] = error.errors()
        raise TraceError(f"{file}:{number}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise TraceError(f"{file}:{number}: {error}") from error


# ---- JSONL ---------------------------------------------------------------------------------------


class _Line(BaseModel):
    """Other fields are no use here."""

    model_config = ConfigDict(frozen=True, strict=True)
    timestamp: float
    input_length: NonNegativeInt
    output_length: NonNegativeInt
    hash_ids: tuple[NonNegativeInt, ...]
    chat_id: int | str | None = None
    parent_chat_id: int | str | None = None


class _Turn(NamedTuple):
    request: TraceRequest
    chat: int | str | None
    parent: int | str | None


def _jsonl(file: Path, first: str, block_tokens: int | None) -> Trace:
    bailian = '"parent_chat_id"' in first
    tokens = block_tokens or (BAILIAN_BLOCK_TOKENS if bailian else MOONCAKE_BLOCK_TOKENS)
    turns: list[_Turn] = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                with _line(file, number):
                    turns.append(_turn(line, number, tokens, 1.0 if bailian else 0.001))
    turns.sort(key=lambda turn: turn.request.arrival)
    start = turns[0].request.arrival
    requests = tuple(replace(turn.request, arrival=turn.request.arrival - start) for turn in turns)
    trace = Trace(name=file.name, block_tokens=tokens, requests=requests)
    return with_told_turns(trace, _parents(turns)) if bailian else with_answers(trace)


def _turn(text: str, number: int, block_tokens: int, seconds: float) -> _Turn:
    """A line; one unit of its timestamp is so many seconds."""
    line = _Line.model_validate_json(text)
    prompt_tokens = max(1, line.input_length)
    request = TraceRequest(
        arrival=line.timestamp * seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=max(1, line.output_length),
        blocks=_blocks(line.hash_ids, prompt_tokens, block_tokens, number),
    )
    return _Turn(request, line.chat_id, line.parent_chat_id)


def _blocks(ids: tuple[int, ...], prompt_tokens: int, block_tokens: int, number: int) -> tuple[int, ...]:
    """A partial last block may have no hash: its content is the line's own."""
    full, count = prompt_tokens // block_tokens, -(-prompt_tokens // block_tokens)
    if full <= len(ids) <= count:
        return ids if len(ids) == count else (*ids, -number)
    raise ValueError(
        f"{len(ids)} hash_ids for {prompt_tokens:,} tokens; blocks of {block_tokens} tokens would be {count}: "
        "say the trace's own size with --block-tokens"
    )


def _parents(turns: list[_Turn]) -> dict[int, int]:
    """Place of a turn -> place of the turn it follows."""
    places = {turn.chat: place for place, turn in enumerate(turns)}
    return {
        place: places[turn.parent]
        for place, turn in enumerate(turns)
        if turn.parent in places and places[turn.parent] < place
    }


# ---- CSV -----------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    arrival: str
    prompt: str
    output: str
    seconds: Callable[[str], float]


def _calendar_seconds(text: str) -> float:
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


_FORMATS = (
    _Columns("timestamp", "contexttokens", "generatedtokens", _calendar_seconds),
    _Columns("timestamp", "request tokens", "response tokens", float),
)


def _csv(file: Path, header: str, block_tokens: int | None) -> Trace:
    names = [name.strip().lower() for name in header.split(",")]
    columns = next((each for each in _FORMATS if {*each[:3]} <= {*names}), None)
    if columns is None:
        raise TraceError(
            f"{file}:1: neither JSON nor columns of Azure (TIMESTAMP, ContextTokens, GeneratedTokens) "
            f"or BurstGPT (Timestamp, Request tokens, Response tokens): {header!r}"
        )
    with file.open(encoding="utf-8-sig", newline="") as lines:
        prompts = list(_prompts(file, csv.reader(lines), names, columns))
    answered = sorted((one for one in prompts if one[2]), key=lambda one: one[0])
    tokens = block_tokens or MOONCAKE_BLOCK_TOKENS
    requests = tuple(unique_blocks([(at - answered[0][0], prompt, out) for at, prompt, out in answered], tokens))
    failed = len(prompts) - len(answered)
    notes = (
        "no hashes: prompts share nothing",
        *([f"{failed:,} requests without an answer left out"] if failed else []),
    )
    return Trace(name=file.name, block_tokens=tokens, requests=requests, notes=notes)


def _prompts(
    file: Path, rows: Iterator[list[str]], names: list[str], columns: _Columns
) -> Iterator[tuple[float, int, int]]:
    """(seconds, prompt tokens, output tokens) of each row under the header."""
    next(rows)
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        with _line(file, number):
            if len(row) != len(names):
                raise ValueError(f"{len(row)} columns under a header of {len(names)}")
            cells = dict(zip(names, row, strict=True))
            prompt, output = int(cells[columns.prompt]), int(cells[columns.output])
            if min(prompt, output) < 0:
                raise ValueError(f"{prompt} prompt tokens and {output} answered: neither can be negative")
            yield columns.seconds(cells[columns.arrival]), max(1, prompt), output
