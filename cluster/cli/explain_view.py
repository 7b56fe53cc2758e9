"""A decision's record for somebody who sees one for the first time. Knows messages and rich, no connection."""

from __future__ import annotations

import textwrap
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeVar

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from diptych.v1.admin_pb2 import Candidate, Explanation, Outcome, PlacedAt, Prediction

T = TypeVar("T")
_INDENT: Final = "  "
_WRAP: Final = 100


def told(record: Explanation) -> Iterator[RenderableType]:
    """Paragraphs and tables, top to bottom: asked, ran, might have run, expected and came about, when."""
    yield Text(f"Request {record.request_id}", style="bold")
    yield _INDENT + _asked(record)
    for number, placed in enumerate(record.placements):
        yield ""
        yield Text("Where it ran, and why" if number == 0 else "Placed again: its worker was lost", style="bold")
        yield textwrap.fill(_ran(placed), _WRAP, initial_indent=_INDENT, subsequent_indent=_INDENT)
        if placed.candidates:
            yield ""
            yield Text("What each way was expected to cost (the cheapest few; milliseconds)", style="bold")
            yield _candidates(placed)
    if record.placements:
        yield ""
        yield Text("Expected and what came about", style="bold")
        yield _compared(record.placements[-1], record.outcome if record.HasField("outcome") else None)
    yield ""
    yield Text("When", style="bold")
    yield _timeline(record)
    yield ""


def _asked(record: Explanation) -> str:
    wishes = [
        f"{name} within {_ms(getattr(record, wish))}"
        for name, wish in (
            ("first token", "wished_ttft_seconds"),
            ("each token", "wished_itl_seconds"),
            ("all of it", "deadline_seconds"),
        )
        if record.HasField(wish)
    ]
    return ", ".join(
        [
            f"{record.prompt_tokens:,} prompt tokens, at most {record.max_tokens:,} to answer",
            *([f"tenant {record.tenant}"] if record.tenant else []),
            *([f"priority {record.priority}"] if record.priority else []),
            *wishes,
            f"asked {record.age_seconds:,.1f} s ago",
        ]
    )


def _ran(placed: PlacedAt) -> str:
    return f"{_way(placed.how, placed.prefill_worker, placed.decode_worker)}. {_sentence(placed.reason)}"


def _way(how: str, prefill: str, decode: str) -> str:
    match how:
        case "remote":
            return f"Apart: {prefill} computed the prompt and sent its KV to {decode}, which wrote the answer"
        case "local":
            return f"In one place: decode worker {decode} computed the prompt, too"
        case _:
            return f"In one place: {decode} did both"


def _sentence(reason: str) -> str:
    return f"Because: {reason}." if reason else ""


def _candidates(placed: PlacedAt) -> Table:
    names = list(dict.fromkeys(term.name for each in placed.candidates for term in each.terms))
    used = [name for name in names if any(_term(each, name) for each in placed.candidates)]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("how", "prefill", "decode"):
        table.add_column(column, no_wrap=True)
    for column in chain(used, ["total"]):
        table.add_column(column, justify="right")
    for place, each in enumerate(placed.candidates):
        costs = [_term(each, name) for name in used]
        numbers = (f"{1000 * cost:,.1f}" if cost else "-" for cost in costs)
        style = "bold" if place == 0 else None
        table.add_row(
            _INDENT + ("→" if place == 0 else " "),
            each.how,
            each.prefill_worker or "-",
            each.decode_worker,
            *numbers,
            f"{1000 * each.cost_seconds:,.1f}",
            style=style,
        )
    return table


def _term(candidate: Candidate, name: str) -> float:
    return sum(term.seconds for term in candidate.terms if term.name == name)


def _compared(placed: PlacedAt, outcome: Outcome | None) -> Table:
    predicted = placed.predicted if placed.HasField("predicted") else None
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "expected", "came about"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, expected, actual in _pairs(predicted, outcome):
        table.add_row(_INDENT + name, expected, actual)
    return table


def _pairs(predicted: Prediction | None, outcome: Outcome | None) -> Iterator[tuple[str, str, str]]:
    served = outcome.served if outcome and outcome.HasField("served") else None
    ttft = outcome.ttft_seconds if outcome and outcome.HasField("ttft_seconds") else None
    itl = outcome.itl_seconds if outcome and outcome.HasField("itl_seconds") else None
    yield "first token after", _or_dash(predicted and predicted.ttft_seconds, _ms), _or_dash(ttft, _ms)
    if predicted:
        yield "  of that, waiting", _ms(predicted.wait_seconds), ""
    yield "between tokens", _or_dash(predicted and predicted.itl_seconds, _ms), _or_dash(itl, _ms)
    found = served.cached_tokens if served else None
    yield "prompt tokens cached", _or_dash(predicted and predicted.cached_tokens, _count), _or_dash(found, _count)
    sent = served.kv_bytes_sent if served else None
    yield "KV sent", _or_dash(predicted and predicted.transfer_bytes, _bytes), _or_dash(sent, _bytes)
    if served and served.kv_bytes_sent:
        yield "  on its way for", "", _ms(served.kv_seconds)
        yield "  not hidden behind computing", "", _ms(served.kv_wait_seconds)


def _timeline(record: Explanation) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    for seconds, what in _moments(record):
        table.add_row(f"{_INDENT}{1000 * seconds:,.1f} ms", what)
    return table


def _moments(record: Explanation) -> Iterator[tuple[float, str]]:
    yield 0.0, "asked for"
    for placed in record.placements:
        yield placed.seconds, f"placed on {' and '.join(filter(None, (placed.prefill_worker, placed.decode_worker)))}"
    outcome = record.outcome if record.HasField("outcome") else None
    if outcome and record.placements and outcome.HasField("ttft_seconds"):
        yield record.placements[-1].seconds + outcome.ttft_seconds, "first token"
    if not record.HasField("ended_seconds"):
        return
    if outcome is None or not (outcome.tokens or record.placements):
        yield record.ended_seconds, f"refused: {record.refusal}"
    else:
        how = "complete" if not outcome.error else outcome.error
        yield record.ended_seconds, f"over: {how}, {outcome.tokens:,} tokens"


def _or_dash(value: T | None, write: Callable[[T], str]) -> str:
    return "-" if value is None else write(value)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _count(number: int) -> str:
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e6:,.2f} MB" if number else "nothing"
