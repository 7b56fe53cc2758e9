"""What two engines on cores of their own cost each other, no cluster about: `make bench-contention`.

Eight sequences decode on the first core while the second one sleeps, multiplies within its registers, or computes
prompts of 2,048 tokens. What a step takes longer beside the registers is shared execution units or clock speed; what it
takes longer still beside prompts is caches and memory. No scheduler can be better than that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from collections import defaultdict
from itertools import repeat
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from cluster.models.naming import resolve
from tests.bench.engine import Rig
from tests.bench.open_loop import percentile
from tests.bench.peak.__main__ import peak_work
from tests.bench.results import Figure, figure, report

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

STREAMS, CONTEXT, PROMPT, SEED = 8, 128, 2048, 3
BESIDE: Final = ("nothing", "registers", "prompts")
WAIT_SECONDS: Final = 120.0
Works: TypeAlias = "dict[str, Callable[[], object]]"


def rig_on(core: int, model: str) -> Rig:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    return Rig(resolve(model, progress=print), "auto", 1)


def neighbour(core: int, model: str, line: Connection) -> None:
    """Does what it was told last, until it is told to do nothing more: None."""
    rig, multiply = rig_on(core, model), peak_work()
    works: Works = {
        "nothing": lambda: time.sleep(0.01),
        "registers": lambda: multiply(100_000),
        "prompts": lambda: rig.prefill(PROMPT),
    }
    for work in works.values():
        work()
    told: str | None = "nothing"
    line.send("ready")
    while told is not None:
        works[told]()
        if line.poll():
            told = line.recv()
            line.send(told)


def steps(rig: Rig, count: int) -> list[float]:
    """Seconds of each."""
    sequences, taken = rig.decoding(STREAMS, CONTEXT), list[float]()
    rig.engine.step()
    for _ in repeat(None, count):
        began = time.perf_counter()
        rig.engine.step()
        taken.append(time.perf_counter() - began)
    rig.end(sequences)
    return taken


def measure(rig: Rig, line: Connection, rounds: int, count: int) -> list[Figure]:
    middle, late, ratio = (defaultdict[str, list[float]](list) for _ in range(3))
    for number in range(rounds):
        order, found = [*BESIDE, "nothing"], defaultdict[str, list[list[float]]](list)
        random.Random(SEED + number).shuffle(order)
        for beside in order:
            line.send(beside)
            assert line.poll(WAIT_SECONDS), "the neighbour hangs"
            line.recv()
            found[beside].append(steps(rig, count))
        alone = found["nothing"][0]
        found["nothing again"] = [found["nothing"].pop()]
        for beside, (taken,) in found.items():
            middle[beside].append(1e3 * percentile(taken, 0.5))
            late[beside].append(1e3 * percentile(taken, 0.99))
            ratio[beside].append(percentile(taken, 0.99) / percentile(alone, 0.99))
    made: list[Figure] = []
    for beside in ratio:
        case = f"decode {STREAMS} at {CONTEXT} beside {beside}"
        made += [
            figure(case, "step, median", "ms", middle[beside]),
            figure(case, "step, p99", "ms", late[beside]),
            figure(case, "p99 / p99 beside nothing", "x", ratio[beside]),
        ]
    return made


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--model", default="smollm2-135m-instruct")
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--steps", type=int, default=150)
    given = asked.parse_args()
    cores = os.sched_getaffinity(0)
    ours, theirs = sorted(cores)[:2]
    line, end = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=neighbour, args=(theirs, given.model, end), daemon=True)
    other.start()
    try:
        rig = rig_on(ours, given.model)
        assert line.poll(WAIT_SECONDS), "the neighbour did not start"
        line.recv()
        found = measure(rig, line, given.rounds, given.steps)
        os.sched_setaffinity(0, cores)  # what is reported of the hardware counts them
        report("contention", found)
        line.send(None)
        other.join(WAIT_SECONDS)
    finally:
        other.kill()


if __name__ == "__main__":
    main()
