"""Eight decoding streams while prompts of 2,048 tokens arrive, beside the same alone: `make bench-interference`.

A round is, on each server in turn, a pair of windows in random order: idle and disturbed. The ratio is the 99th
percentile of the gaps between tokens, disturbed over idle; its interval is a bootstrap over rounds. Idle over idle is
the same ratio of two windows in which nothing differs: what the machine's own noise makes of it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import defaultdict
from contextlib import AsyncExitStack, ExitStack
from statistics import median

from endpoints import endpoint
from open_loop import Endpoint, Spoken, Wanted, percentile
from results import Figure, figure, report

STREAMS, CONTEXT, ANSWER = 8, 128, 160
BURST, LONG, AFTER_SECONDS, APART_SECONDS = 3, 2048, 1.0, 1.5
SEED = 11


async def window(server: Endpoint, seed: int, *, disturbed: bool) -> tuple[float, list[float]]:
    """The 99th percentile of the streams' gaps, and the times to first token of the long prompts."""
    asked = [Wanted(0.0, CONTEXT, ANSWER) for _ in range(STREAMS)]
    if disturbed:
        asked += [Wanted(AFTER_SECONDS + APART_SECONDS * number, LONG, 1) for number in range(BURST)]
    said = await server.play(asked, seed)
    for each in said:
        if each.error:
            raise SystemExit(f"a request ended in {each.error}")
    return percentile(gaps(said[:STREAMS]), 0.99), [each.ttft for each in said[STREAMS:]]


def gaps(streams: list[Spoken]) -> list[float]:
    """Without the beginning, when the streams' own prompts are computed."""
    began = max(each.came[0] for each in streams)
    return [
        later - earlier
        for each in streams
        for earlier, later in zip(each.came, each.came[1:], strict=False)
        if earlier >= began
    ]


def bootstrap(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of drawn samples."""
    dice = random.Random(SEED)
    medians = sorted(median(dice.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[-101]


async def measure(names: list[str], rounds: int) -> list[Figure]:
    idle, disturbed, ratios, nothing, first = (defaultdict[str, list[float]](list) for _ in range(5))
    with ExitStack() as servers:
        async with AsyncExitStack() as clients:
            ends = {n: await clients.enter_async_context(Endpoint(servers.enter_context(endpoint(n)))) for n in names}
            for number in range(rounds + 1):
                for name, end in ends.items():
                    kinds = ["idle", "idle", "disturbed"]
                    random.Random(number).shuffle(kinds)
                    found = defaultdict[str, list[float]](list)
                    for place, kind in enumerate(kinds):
                        p99, ttft = await window(end, 10 * number + place, disturbed=kind == "disturbed")
                        found[kind].append(p99)
                        if number:
                            first[name] += ttft
                    if not number:
                        continue  # the first round warms up
                    print(f"{name}: {dict(found)}", file=sys.stderr, flush=True)
                    idle[name] += found["idle"]
                    disturbed[name] += found["disturbed"]
                    ratios[name].append(found["disturbed"][0] / median(found["idle"]))
                    nothing[name].append(found["idle"][0] / found["idle"][1])
    made: list[Figure] = []
    for name in names:
        low, high = bootstrap(ratios[name])
        print(f"{name}: disturbed / idle {median(ratios[name]):.2f} ({low:.2f} to {high:.2f}, 95 % bootstrap)")
        milliseconds = [1e3 * each for each in idle[name]], [1e3 * each for each in disturbed[name]]
        made += [
            figure(name, "gap between tokens, p99, idle", "ms", milliseconds[0]),
            figure(name, "gap between tokens, p99, disturbed", "ms", milliseconds[1]),
            figure(name, "disturbed / idle", "x", ratios[name]),
            figure(name, "idle / idle", "x", nothing[name]),
            figure(name, "time to first token of a 2,048-token prompt", "ms", [1e3 * each for each in first[name]]),
        ]
    return made


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--rounds", type=int, default=7)
    asked.add_argument("--servers", default="disaggregated, remote;aggregated on one core;aggregated;vllm")
    given = asked.parse_args()
    report("interference", asyncio.run(measure(given.servers.split(";"), given.rounds)))


if __name__ == "__main__":
    main()
