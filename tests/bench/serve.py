"""Requests at random times, at rising rates, against servers in turn: throughput and goodput, `make bench-serve`.

A request is good when its first token came within `--ttft` seconds and its mean time between tokens was at most
`--itl`. Prompts of 512 tokens and answers of 64, or lengths of an Azure trace (`--trace FILE.csv`). Writes a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from endpoints import endpoint
from open_loop import Endpoint, Spoken, Wanted, percentile, poisson
from results import ROOT, Figure, figure, report

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT, ANSWER, SEED = 512, 64, 5
LONGEST_PROMPT, LONGEST_ANSWER = 2048, 128
GOOD_SHARE = 0.9


def asked_of(trace: str, rate: float, seconds: float) -> list[Wanted]:
    count = max(8, round(rate * seconds))
    asked = poisson(rate, count, PROMPT, ANSWER, SEED)
    if not trace:
        return asked
    with Path(trace).open() as file:
        rows = list(csv.DictReader(file))
    drawn = random.Random(SEED).choices(rows, k=count)
    return [
        Wanted(one.at, min(int(row["ContextTokens"]), LONGEST_PROMPT), min(int(row["GeneratedTokens"]), LONGEST_ANSWER))
        for one, row in zip(asked, drawn, strict=True)
    ]


def is_good(one: Spoken, ttft: float, itl: float) -> bool:
    return not one.error and one.ttft <= ttft and one.itl <= itl


def figures_of(case: str, said: Sequence[Spoken], ttft: float, itl: float) -> list[Figure]:
    whole = [each for each in said if not each.error]
    seconds = max((each.came[-1] for each in whole), default=0.0) - min(each.sent for each in said)
    good = sum(is_good(each, ttft, itl) for each in said)

    def one(metric: str, unit: str, value: float) -> Figure:
        return figure(case, metric, unit, [value])

    made = [one("good", "%", 100 * good / len(said)), one("failed", "requests", len(said) - len(whole))]
    if whole:
        made += [
            one("throughput", "tokens/s", sum(each.tokens for each in whole) / seconds),
            one("goodput", "requests/s", good / seconds),
            one("time to first token, p50", "ms", 1e3 * percentile([each.ttft for each in whole], 0.5)),
            one("time to first token, p99", "ms", 1e3 * percentile([each.ttft for each in whole], 0.99)),
            one("time between tokens, p50", "ms", 1e3 * percentile([each.itl for each in whole], 0.5)),
            one("time between tokens, p99", "ms", 1e3 * percentile([each.itl for each in whole], 0.99)),
        ]
    return made


async def play(http: str, asked: list[Wanted], seed: int) -> list[Spoken]:
    async with Endpoint(http) as server:
        return await server.play(asked, seed)


def plot(figures: Sequence[Figure], names: Sequence[str]) -> Path:
    from matplotlib.figure import Figure as Plot

    drawn = Plot(figsize=(10, 4), layout="constrained")
    for place, (metric, unit) in enumerate((("good", "%"), ("throughput", "tokens/s"))):
        axes = drawn.add_subplot(1, 2, place + 1)
        for name in names:
            points = [
                (float(one.case.rpartition(" at ")[2].removesuffix("/s")), one.value)
                for one in figures
                if one.metric == metric and one.case.rpartition(" at ")[0] == name
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel="requests a second", ylabel=f"{metric} [{unit}]", ylim=(0, None))
        axes.legend()
    file = ROOT / ".bench" / "serve.png"
    drawn.savefig(file, dpi=120)
    return file


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--rates", default="1,2,3,4,6,8")
    asked.add_argument("--seconds", type=float, default=30, help="how long each rate is kept up")
    asked.add_argument("--ttft", type=float, default=2.0)
    asked.add_argument("--itl", type=float, default=0.1)
    asked.add_argument("--trace", default="", help="lengths from an Azure CSV")
    asked.add_argument("--servers", default="aggregated;disaggregated;vllm")
    given = asked.parse_args()
    names, rates = given.servers.split(";"), [float(rate) for rate in given.rates.split(",")]
    made: list[Figure] = []
    keeps: defaultdict[str, float] = defaultdict(float)
    for name in names:
        with endpoint(name) as http:
            asyncio.run(play(http, poisson(4, 8, PROMPT, 8, 1), 1))  # warms up
            for number, rate in enumerate(rates):
                said = asyncio.run(play(http, asked_of(given.trace, rate, given.seconds), 10 + number))
                found = figures_of(f"{name} at {rate:g}/s", said, given.ttft, given.itl)
                print(f"{name} at {rate:g}/s: {found[0].value:.0f} % good", file=sys.stderr, flush=True)
                made += found
                if found[0].value < 100 * GOOD_SHARE:
                    break  # what is faster is worse
                keeps[name] = rate
    report("serve", made)
    print(plot(made, names))
    for name in names:
        print(f"{name}: {GOOD_SHARE:.0%} good up to {keeps[name]:g} requests a second")


if __name__ == "__main__":
    main()
