"""Eight decoding streams while prompts of 2,048 tokens arrive, beside the same alone: `make bench-interference`.

A round is, on each server in turn while no other runs, windows in random order: idle, idle and disturbed. The ratio is
the 99th percentile of the gaps between tokens, disturbed over idle; its interval is a bootstrap over rounds. Idle over
idle is the same ratio of two windows in which nothing differs: what the machine's own noise makes of it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from endpoints import endpoint, vllm
from open_loop import Endpoint, Spoken, Wanted, percentile
from results import Figure, figure, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

STREAMS, CONTEXT, ANSWER = 8, 128, 160
BURST, LONG, AFTER_SECONDS, APART_SECONDS = 3, 2048, 1.0, 1.5
SEED = 11


SHARES = (0.5, 0.9, 0.95, 0.99)


async def window(server: Endpoint, seed: int, *, disturbed: bool) -> tuple[list[float], list[float]]:
    """`SHARES` of the streams' gaps, and the times to first token of the long prompts."""
    asked = [Wanted(0.0, CONTEXT, ANSWER) for _ in range(STREAMS)]
    if disturbed:
        asked += [Wanted(AFTER_SECONDS + APART_SECONDS * number, LONG, 1) for number in range(BURST)]
    said = await server.play(asked, seed)
    for each in said:
        if each.error:
            raise SystemExit(f"a request ended in {each.error}")
    found = gaps(said[:STREAMS])
    return [percentile(found, share) for share in SHARES], [each.ttft for each in said[STREAMS:]]


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


@dataclass
class Found:
    """Of one server, over all rounds."""

    ratios: list[float] = field(default_factory=list[float])
    nothing: list[float] = field(default_factory=list[float])
    first: list[float] = field(default_factory=list[float])
    spread: dict[str, list[list[float]]] = field(default_factory=lambda: {"idle": [], "disturbed": []})


@contextmanager
def servers(names: list[str]) -> Iterator[Callable[[str], AbstractContextManager[str]]]:
    """A server's name → a context in which it alone runs. Ours start anew each time."""
    with ExitStack() as stack:
        other = stack.enter_context(vllm(2)) if "vllm" in names else None
        yield lambda name: other.alone() if other and name == "vllm" else endpoint(name)


async def pair(http: str, number: int, found: Found) -> str:
    """Windows in random order, after one that warms up."""
    kinds = ["idle", "idle", "disturbed"]
    random.Random(number).shuffle(kinds)
    late: dict[str, list[float]] = {"idle": [], "disturbed": []}
    async with Endpoint(http) as end:
        await window(end, 10 * number, disturbed=True)
        for place, kind in enumerate(kinds):
            shares, first = await window(end, 10 * number + 1 + place, disturbed=kind == "disturbed")
            found.first += first
            found.spread[kind].append(shares)
            late[kind].append(shares[-1])
    found.ratios.append(late["disturbed"][0] / median(late["idle"]))
    found.nothing.append(late["idle"][0] / late["idle"][1])
    return str(late)


def measure(names: list[str], rounds: int) -> list[Figure]:
    found = {name: Found() for name in names}
    with servers(names) as alone:
        for number in range(rounds):
            for name in names:
                with alone(name) as http:
                    said = asyncio.run(pair(http, number, found[name]))
                print(f"{name}: {said}", file=sys.stderr, flush=True)
    made: list[Figure] = []
    for name, one in found.items():
        low, high = bootstrap(one.ratios)
        print(f"{name}: disturbed / idle {median(one.ratios):.2f} ({low:.2f} to {high:.2f}, 95 % bootstrap)")
        for place, share in enumerate(SHARES):
            made += [
                figure(
                    name, f"gap between tokens, p{100 * share:g}, {kind}", "ms", [1e3 * each[place] for each in spread]
                )
                for kind, spread in one.spread.items()
            ]
        made += [
            figure(name, "disturbed / idle", "x", one.ratios),
            figure(name, "idle / idle", "x", one.nothing),
            figure(name, "time to first token of a 2,048-token prompt", "ms", [1e3 * each for each in one.first]),
        ]
    return made


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--rounds", type=int, default=7)
    asked.add_argument("--servers", default="disaggregated, remote;aggregated on one core;aggregated;vllm")
    given = asked.parse_args()
    report("interference", measure(given.servers.split(";"), given.rounds))


if __name__ == "__main__":
    main()
