"""Predicted against actual time to first token on a live cluster: `make bench-predict`.

Prompts of 16 to 2,048 tokens, log-uniform, half of them beginning like others, arriving at random at about
a third of what the cluster can do (measured first). The requests before `--warm-up` teach the rates.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from results import Figure, report
from serving import serving

from cluster.replay.figures import figures
from cluster.replay.player import Player
from cluster.replay.prompts import Wanted
from diptych.async_client import AsyncClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.replay.figures import Figures

SHORTEST, LONGEST = 16, 2048
KEPT = 4096
TOKENS = range(32, 256)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked."""

    requests: int
    share: float
    """Of what the cluster can do."""
    seed: int


def prompts(load: Load) -> list[tuple[int, ...]]:
    """Half of them begin with one of six that many share."""
    dice = random.Random(load.seed)
    common = [dice.choices(TOKENS, k=LONGEST) for _ in range(6)]
    lengths = [round(math.exp(dice.uniform(math.log(SHORTEST), math.log(LONGEST)))) for _ in range(load.requests)]
    made: list[tuple[int, ...]] = []
    for length in lengths:
        shared = min(length, dice.choice((128, 256, 512))) if dice.random() < 0.5 else 0
        made.append((*dice.choice(common)[:shared], *dice.choices(TOKENS, k=length - shared)))
    return made


def answer(dice: random.Random) -> tuple[int, ...]:
    return tuple(dice.choices(TOKENS, k=dice.choice((4, 8, 16, 32))))


async def seconds_each(client: AsyncClient, load: Load) -> float:
    """Of a request when they come one after the other."""
    dice = random.Random(load.seed + 1)
    asked = [Wanted(0.0, prompt, answer(dice)) for prompt in prompts(Load(24, load.share, load.seed + 1))]
    player = Player(client, 1.0, lambda _: None)
    began = time.monotonic()
    for wanted in asked:
        await player.play([wanted])
    return (time.monotonic() - began) / len(asked)


async def measure(target: str, load: Load, warm_up: int) -> tuple[Figures, float]:
    dice = random.Random(load.seed)
    async with AsyncClient(target) as client:
        between = await seconds_each(client, load) / load.share
        at, asked = 0.0, list[Wanted]()
        for prompt in prompts(load):
            at += dice.expovariate(1 / between)
            asked.append(Wanted(at, prompt, answer(dice)))
        player = Player(client, 1.0, lambda _: None)
        began = time.monotonic()
        played = await player.play(asked)
        seconds = time.monotonic() - began
        return figures(await player.explained(played, KEPT), seconds, warm_up=warm_up), 1 / between


def told(found: Figures) -> Sequence[Figure]:
    error = found.prediction
    assert error is not None, "no prediction was recorded"
    assert found.ttft is not None, "nothing was answered"

    def one(metric: str, unit: str, value: float) -> Figure:
        return Figure(case="ttft", metric=metric, value=value, unit=unit, low=value, high=value, n=error.requests)

    return (
        one("predicted: median absolute error", "%", 100 * error.relative),
        one("always the median: median absolute error", "%", 100 * error.median_relative),
        one("predicted / always the median", "x", error.relative / error.median_relative),
        one("predicted: median absolute error", "ms", 1000 * error.seconds),
        one("always the median: median absolute error", "ms", 1000 * error.median_seconds),
        one("time to first token, p50", "ms", 1000 * found.ttft.p50),
        one("time to first token, p99", "ms", 1000 * found.ttft.p99),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=350)
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("serve", nargs="*", help="further arguments of `diptych serve`, after --")
    asked = parser.parse_args()
    with serving(*asked.serve) as cluster:
        load = Load(asked.requests, asked.share, asked.seed)
        found, rate = asyncio.run(measure(cluster.grpc, load, asked.warm_up))
    print(f"{found.answered} of {found.requests} answered at {rate:.2f} a second, {found.hit_rate:.0%} cached")
    report("predict", told(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
