"""`diptych replay`: a trace on a live cluster. Knows options and printing; the replay itself is `cluster.replay`."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from cluster.models.progress import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.replay.figures import Figures, Spread
    from cluster.replay.player import Played
    from cluster.simulate.trace import Trace
    from cluster.terminal import Terminal

_KEPT = 4096
"""Records that a scheduler keeps."""


@click.command(short_help="A trace on a live cluster.", epilog=EXIT_CODES)
@click.argument("trace")
@takes_grpc
@click.option(
    "--speed", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Times faster."
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N requests.")
@click.option("--shrink", type=click.IntRange(1), default=1, metavar="N", help="Prompts and answers N times shorter.")
@click.option("--block-tokens", type=click.IntRange(16), metavar="N", help="Of the trace's hashes.")
@click.option(
    "--warm-up", type=click.IntRange(0), default=50, metavar="N", help="Predictions of the first N don't count."
)
@click.option("--seed", default=0, metavar="N", help="Of times inside a rounded bin.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every request there.")
def replay(
    trace: str,
    target: str,
    *,
    speed: float,
    limit: int | None,
    shrink: int,
    block_tokens: int | None,
    warm_up: int,
    seed: int,
    json_file: Path | None,
) -> None:
    """Send TRACE to a running cluster, each request at its time whatever became of those before, and say how it went.

    TRACE is as for simulate. Equal hashes get equal tokens, and answers are made to be the trace's.

    \b
    Example:
      diptych replay trace.jsonl --speed 2 --limit 500 --shrink 8
    """
    from cluster.replay.figures import figures
    from cluster.terminal import Terminal

    read = _trace(trace, block_tokens, limit, shrink, seed)
    with exit_codes(), Terminal() as terminal:
        sent, played, seconds = asyncio.run(_play(read, target, speed, terminal))
    found = figures(played, seconds, warm_up=warm_up)
    for line in _lines(sent, found):
        click.echo(line)
    if json_file:
        json_file.write_text(json.dumps({**asdict(found), "played": [asdict(one) for one in played]}, indent=1) + "\n")


def _trace(source: str, block_tokens: int | None, limit: int | None, shrink: int, seed: int) -> Trace:
    from cluster.replay.prompts import shrunk
    from cluster.simulate.readers import read_trace
    from cluster.simulate.trace import TraceError

    try:
        trace = read_trace(source, block_tokens=block_tokens).spread(seed)
        return shrunk(trace.head(limit) if limit else trace, shrink)
    except TraceError as error:
        raise click.UsageError(str(error)) from error


async def _play(trace: Trace, target: str, speed: float, terminal: Terminal) -> tuple[Trace, list[Played], float]:
    """What of the trace was sent, how it went and how long that took."""
    from cluster.replay.player import Player
    from cluster.replay.prompts import fitting, wanted_of
    from cluster.simulate.trace import TraceError
    from diptych.async_client import AsyncClient

    async with AsyncClient(target) as client:
        [model] = await client.models()
        try:
            trace = fitting(trace, model.max_context)
        except TraceError as error:
            raise click.UsageError(str(error)) from error
        wanted = [wanted_of(trace, request, number) for number, request in enumerate(trace.requests)]
        player = Player(client, speed, lambda over: terminal.tell(_step(over, len(wanted))))
        began = time.monotonic()
        played = await player.play(wanted)
        seconds = time.monotonic() - began
        return trace, await player.explained(played, _KEPT), seconds


def _step(over: int, whole: int) -> Step:
    return Step(f"{over:,} of {whole:,} answers", over, whole)


def _lines(trace: Trace, found: Figures) -> Iterator[str]:
    yield f"{trace.name}: {found.answered:,} of {found.requests:,} requests answered in {found.seconds:,.1f} s"
    yield from (f"  {note}" for note in trace.notes)
    yield from (f"  {count:,} ended in {error}" for error, count in sorted(found.errors.items()))
    yield _spread("time to first token", found.ttft)
    yield _spread("time between tokens", found.itl)
    yield f"prompt tokens        {found.prompt_tokens:,}, {found.hit_rate:.1%} of them cached"
    yield f"tokens answered      {found.tokens:,}, {found.tokens / found.seconds:,.1f} a second"
    if found.late_seconds > 0.1:
        yield f"this client was late by up to {found.late_seconds:.2f} s: the load was gentler than the trace's"
    if (error := found.prediction) is None:
        yield "predictions          none were recorded"
        return
    yield (
        f"predicted first token off by {error.relative:.1%} ({1000 * error.seconds:,.1f} ms) in the median of "
        f"{error.requests:,} requests; always predicting the median: {error.median_relative:.1%} "
        f"({1000 * error.median_seconds:,.1f} ms)"
    )


def _spread(name: str, spread: Spread | None) -> str:
    if spread is None:
        return f"{name}  none"
    return f"{name}  " + "  ".join(
        f"p{at} {1000 * value:,.1f} ms" for at, value in zip((50, 90, 99), spread, strict=True)
    )
