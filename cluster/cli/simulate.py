"""`diptych simulate`: the real scheduler against virtual workers. Knows options and printing, no simulation."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from cluster.simulate.compare import Comparison, Result
    from cluster.simulate.constants import Constants
    from cluster.simulate.run import Kill
    from cluster.simulate.trace import Trace

_NAMES = ("round_robin", "least_loaded", "longest_prefix", "queue_plus_uncached", "dynamo", "llm-d", "ours")
_SHARDED = ("ours-2", "ours-4", "ours-8")
_MODES = "cluster, or placement: prefill alone."
_PIPE_COLUMNS = 200
_KILL = re.compile(r"(?P<worker>[a-z]+-\d+)@(?P<at>[\d.]+)(\+(?P<absent>[\d.]+))?")


@click.command(short_help="The real scheduler against virtual workers in virtual time.")
@click.argument("trace")
@click.option("--mode", type=click.Choice(("cluster", "placement")), metavar="M", default="cluster", help=_MODES)
@click.option(
    "--policy",
    "names",
    type=click.Choice((*_NAMES, *_SHARDED)),
    metavar="NAME",
    multiple=True,
    help="ours, dynamo, …; else all.",
)
@click.option("--speeds", metavar="S,S", help="How much faster than recorded; else 1.")
@click.option("--highest", is_flag=True, help="Find the highest speed that keeps the SLO.")
@click.option("--tune", is_flag=True, help="First find the others' best weights on TRACE.")
@click.option("--plan", is_flag=True, help="Find the smallest pools that keep the SLO.")
@click.option("--pools", metavar="P:D[:M]", help="Prefill, decode, mixed workers.")
@click.option("--kill", "kills", metavar="W@S[+S]", multiple=True, help="Worker W dies at S, back S later.")
@click.option("--constants", metavar="FILE", help="JSON of rates, link, SLO; else an 8B model.")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="A constant, as in link.latency_seconds=0.")
@click.option("--block-tokens", type=click.IntRange(16), metavar="N", help="Of hashes; else 512, Bailian 16.")
@click.option("--seed", default=0, metavar="N", help="Of what is drawn.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
@click.option("--plot", "plot_folder", type=click.Path(file_okay=False, path_type=Path), help="Write PNGs there.")
def simulate(
    trace: str,
    *,
    mode: Literal["cluster", "placement"],
    names: tuple[str, ...],
    speeds: str | None,
    highest: bool,
    tune: bool,
    plan: bool,
    pools: str | None,
    kills: tuple[str, ...],
    constants: str | None,
    settings: tuple[str, ...],
    block_tokens: int | None,
    seed: int,
    json_file: Path | None,
    plot_folder: Path | None,
) -> None:
    """Serve TRACE by virtual workers once for each policy, and compare. TRACE is
    Mooncake or Bailian JSONL, Azure or BurstGPT CSV, single-turn:N or flip:N.

    \b
    Example:
      diptych simulate trace.jsonl --policy ours --policy dynamo --speeds 4,8
    """
    from cluster.simulate.compare import Comparison, compare
    from cluster.terminal import Terminal

    chosen = _constants(constants, settings, pools)
    if plot_folder:
        _check_plots()
    read = _trace(trace, block_tokens, chosen.trace.requests)
    if mode == "placement":
        _place(read, chosen, names or _NAMES, json_file)
        return
    read = read.spread(seed)
    asked = _speeds(speeds) or (() if highest else (1.0,))
    with Terminal() as terminal:
        if plan:
            comparison = Comparison(trace=read, constants=chosen, tell=terminal.tell)
            _plan(comparison, names[0] if names else "ours", asked or (1.0,), json_file)
            return
        comparison = Comparison(trace=read, constants=chosen, kills=_kills(kills, chosen), tell=terminal.tell)
        results = list(compare(comparison, names or _NAMES, asked, highest=highest, tune=tune))
    _print(comparison, results)
    if json_file:
        _write(json_file, comparison, results, seed)
    if plot_folder:
        _draw(plot_folder, comparison, results)


def _place(trace: Trace, constants: Constants, names: Sequence[str], json_file: Path | None) -> None:
    from cluster.simulate.compare import placements
    from cluster.simulate.tables import placed_table, weights_used
    from cluster.terminal import Terminal

    with Terminal() as terminal:
        results = list(placements(trace, constants, names, terminal.tell))
    console, placement = _console(), constants.placement
    console.print(
        f"{trace.name}: {len(trace.requests):,} requests, {placement.instances} instances of {placement.blocks:,} "
        f"blocks of {trace.block_tokens} tokens, {placement.tokens_per_second:,.0f} tokens a second each"
    )
    console.print(placed_table(results))
    console.print(*weights_used(results), sep="\n", markup=False)
    if json_file:
        told = {"trace": trace.name, "constants": constants.model_dump(), "results": [asdict(one) for one in results]}
        json_file.write_text(json.dumps(told, indent=1) + "\n")


def _plan(comparison: Comparison, name: str, speeds: Sequence[float], json_file: Path | None) -> None:
    from cluster.simulate.compare import MAKERS
    from cluster.simulate.plan import TooMuch, plan
    from cluster.simulate.tables import plan_json, plan_table

    try:
        plans = [plan(comparison, MAKERS[name], speed) for speed in speeds]
    except TooMuch as error:
        raise click.ClickException(str(error)) from error
    trace, slo, console = comparison.trace, comparison.constants.slo, _console()
    console.print(
        f"{trace.name}: {len(trace.requests):,} requests in {trace.seconds:,.0f} s, placed by {name}",
        f"SLO: of {slo.share:.0%} the first token within {slo.ttft_seconds:g} s + "
        f"{slo.ttft_seconds_per_1000_prompt_tokens:g} s per 1,000 prompt tokens, the others every "
        f"{1000 * slo.mean_itl_seconds:g} ms on average",
        *trace.notes,
        sep="\n",
        markup=False,
    )
    console.print(plan_table(plans))
    if json_file:
        told = {"trace": trace.name, "constants": comparison.constants.model_dump(), "plans": plan_json(plans)}
        json_file.write_text(json.dumps(told, indent=1) + "\n")


# ---- options ---------------------------------------------------------------------------------------


def _trace(source: str, block_tokens: int | None, requests: int | None) -> Trace:
    from cluster.simulate.readers import read_trace
    from cluster.simulate.trace import TraceError

    try:
        read = read_trace(source, block_tokens=block_tokens)
    except TraceError as error:
        raise click.ClickException(str(error)) from error
    return read.head(requests) if requests else read


def _constants(path: str | None, settings: Sequence[str], pools: str | None) -> Constants:
    from cluster.simulate.constants import ConstantsError, read_constants

    told = dict(_setting(text) for text in settings)
    try:
        return read_constants(path, told | _pools(pools))
    except ConstantsError as error:
        raise click.ClickException(str(error)) from error


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not like link.latency_seconds=0.01", param_hint="--set")
    return key.strip(), value.strip()


def _pools(pools: str | None) -> dict[str, str]:
    if pools is None:
        return {}
    counts = pools.split(":")
    if len(counts) not in (2, 3) or not all(count.isascii() and count.isdigit() for count in counts):
        raise click.BadParameter(f"{pools!r} is not like 16:16 or 4:4:2", param_hint="--pools")
    roles = ("workers.prefill", "workers.decode", "workers.mixed")
    return dict(zip(roles, (*counts, "0"), strict=False))


def _speeds(text: str | None) -> tuple[float, ...]:
    try:
        speeds = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        speeds = (0.0,)
    if any(not 0 < speed < float("inf") for speed in speeds):
        raise click.BadParameter(f"{text!r} is not like 1 or 4,8,12", param_hint="--speeds")
    return speeds


def _kills(texts: Sequence[str], constants: Constants) -> tuple[Kill, ...]:
    from cluster.simulate.fleet import worker_info
    from cluster.simulate.run import Kill
    from diptych.types import WorkerId

    known = {info.id for info in worker_info(constants, 16)}
    kills: list[Kill] = []
    for text in texts:
        told = _KILL.fullmatch(text)
        if told is None:
            raise click.BadParameter(f"{text!r} is not like decode-0@60 or decode-0@60+5", param_hint="--kill")
        worker = WorkerId(told["worker"])
        if worker not in known:
            raise click.BadParameter(f"{worker} is none of {', '.join(sorted(known))}", param_hint="--kill")
        kills.append(Kill(worker=worker, at=float(told["at"]), absent_seconds=float(told["absent"] or 10)))
    return tuple(kills)


# ---- results ---------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_PIPE_COLUMNS, highlight=False)


def _print(comparison: Comparison, results: Sequence[Result]) -> None:
    from cluster.simulate.tables import against, result_table, weights_used

    trace, workers = comparison.trace, comparison.constants.workers
    console = _console()
    console.print(
        f"{trace.name}: {len(trace.requests):,} requests in {trace.seconds:,.0f} s on {workers.prefill} prefill, "
        f"{workers.decode} decode and {workers.mixed} mixed workers",
        *trace.notes,
        sep="\n",
        markup=False,
    )
    console.print(result_table(results))
    console.print(*weights_used(results), *against(results), sep="\n", markup=False)


def _write(file: Path, comparison: Comparison, results: Sequence[Result], seed: int) -> None:
    from cluster.simulate.tables import result_json

    told = {
        "trace": comparison.trace.name,
        "requests": len(comparison.trace.requests),
        "seed": seed,
        "notes": comparison.trace.notes,
        "constants": comparison.constants.model_dump(),
        "results": result_json(results),
    }
    file.write_text(json.dumps(told, indent=1) + "\n")


def _check_plots() -> None:
    from cluster.simulate.plots import NoPlots, check_plots

    try:
        check_plots()
    except NoPlots as error:
        raise click.ClickException(str(error)) from error


def _draw(folder: Path, comparison: Comparison, results: Sequence[Result]) -> None:
    from cluster.simulate.plots import write_plots

    for file in write_plots(folder, results, comparison.constants.slo):
        click.echo(file)
