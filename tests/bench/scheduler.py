"""What the scheduler costs, per CPU second of one core: block events, look-ups and placements, and the index's memory.

make bench-scheduler                 all of it
make bench-scheduler ARGS=placements only that part; also index, memory, regret, dynamo

`dynamo` puts the Rust router's index of `ai-dynamo-runtime` beside ours, on the same events and look-ups, where pip
finds it: it gets an environment of its own in .bench/dynamo.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.events import Reported, TimePassed, WorkerJoined
from cluster.scheduler.fleet import FAR, NEAR
from cluster.scheduler.placement import Decision, place
from cluster.scheduler.prefix_index import PrefixIndex
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from cluster.scheduler.view import ClusterView
from diptych.types import (
    BlockHash,
    Counters,
    Evicted,
    KvLayout,
    Load,
    ModelSource,
    Report,
    RequestId,
    Role,
    StepSample,
    Stored,
    TransferSample,
    WorkerId,
    WorkerInfo,
)
from tests.bench import index_load
from tests.bench.index_load import BLOCKS, CHAIN, EVENT_BLOCKS, LOOK_UPS
from tests.bench.results import ROOT, Figure, figure, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from cluster.scheduler.fleet import Array

ROUNDS, PLACEMENTS = 5, 4_000
CHURNED, STATES = 10_000_000, 200
LAYOUT = KvLayout(layers=32, kv_heads=8, block_size=16, head_dim=128, dtype="bf16")
MODEL = ModelSource(name="m", path="m", digest="d")


def main() -> None:
    parts: dict[str, Callable[[], Iterator[Figure]]] = {
        "index": _index,
        "memory": _memory,
        "placements": _placements,
        "regret": _regret,
        "dynamo": _dynamo,
    }
    figures: list[Figure] = []
    for part in sys.argv[1:] or parts:
        figures += parts[part]()
    report("scheduler", figures)


# ---- the index ---------------------------------------------------------------------------------


def _index() -> Iterator[Figure]:
    chains = _chains()
    for size in EVENT_BLOCKS:
        index = _empty_index()
        told = list(index_load.events(len(chains), size))
        began = time.process_time()
        for chain, worker, first, stop in told:
            index.apply(_worker(worker), Stored(chains[chain][first:stop]))
        stored_seconds = time.process_time() - began
        first_time, again = (_look_ups(index, chains) for _ in range(2))
        began = time.process_time()
        for chain, worker, first, stop in reversed(told):
            index.apply(_worker(worker), Evicted(chains[chain][first:stop]))
        seconds = stored_seconds + time.process_time() - began
        assert len(index) == 0, "a block is left"
        case = f"ours, {size} blocks an event"
        yield figure(case, "block events", "1/s", [4 * BLOCKS / seconds])
        yield figure(case, "first look-ups", "1/s", [first_time])
        yield figure(case, "look-ups", "1/s", [again])


def _look_ups(index: PrefixIndex, chains: Sequence[tuple[BlockHash, ...]]) -> float:
    asked = [_copies(chains[chain]) for chain in index_load.looked_up(len(chains))]
    began = time.process_time()
    for names in asked:
        [(tokens, holders)] = index.depths(names)
        assert (tokens, holders.bit_count()) == (16 * CHAIN, 2), "two workers have each chain"
    return LOOK_UPS / (time.process_time() - began)


def _empty_index() -> PrefixIndex:
    index = PrefixIndex()
    for worker in range(index_load.WORKERS):
        index.add(_worker(worker), 16)
    return index


def _memory() -> Iterator[Figure]:
    for size in EVENT_BLOCKS:
        index, before = _empty_index(), _resident_bytes()
        for chain in range(BLOCKS // CHAIN):
            names = _chain(chain)
            for worker, first in itertools.product(index_load.holders(chain), range(0, CHAIN, size)):
                index.apply(_worker(worker), Stored(names[first : first + size]))
        assert len(index) == BLOCKS, "names are lost"
        built = _resident_bytes()
        yield figure(f"two holders, {size} blocks an event", "index", "B/block", [(built - before) / BLOCKS])
        if size == EVENT_BLOCKS[0]:
            yield from _churn(index, before, built)
        del index
        gc.collect()


def _churn(index: PrefixIndex, empty: int, built: int) -> Iterator[Figure]:
    """As many new blocks as leave, chain by chain. Python's tables settle at twice their least size or less."""
    settled = _turn_over(index, BLOCKS, 2 * BLOCKS)
    after = _turn_over(index, 2 * BLOCKS, 2 * BLOCKS + CHURNED)
    yield figure(
        "all blocks replaced once", "index beside itself when built", "x", [(settled - empty) / (built - empty)]
    )
    yield figure("then 10M blocks of churn", "index beside itself before", "x", [(after - empty) / (settled - empty)])


def _turn_over(index: PrefixIndex, first: int, stop: int) -> int:
    """Bytes afterwards."""
    for chain in range(first // CHAIN, stop // CHAIN):
        old, new = _chain(chain - BLOCKS // CHAIN), _chain(chain)
        for worker in index_load.holders(chain):
            index.apply(_worker(worker), Stored(new))
        for worker in index_load.holders(chain - BLOCKS // CHAIN):
            index.apply(_worker(worker), Evicted(old))
    assert len(index) == BLOCKS, "names are lost"
    return _resident_bytes()


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- placements --------------------------------------------------------------------------------


def _placements() -> Iterator[Figure]:
    chains = _chains()
    for prefill, decode in ((32, 32), (500, 500)):
        cluster = _Cluster(prefill, decode, chains)
        case = f"{prefill} P x {decode} D, {cluster.view.index_blocks:,} blocks indexed"
        rounds = [[*cluster.timed(cluster.place)] for _ in range(ROUNDS)]
        yield figure(case, "placements", "1/s", [len(took) / sum(took) for took in rounds])
        yield figure(case, "p99", "ms", [1e3 * sorted(took)[len(took) * 99 // 100] for took in rounds])
        rounds = [[*cluster.timed(cluster.schedule)] for _ in range(ROUNDS)]
        yield figure(
            f"{case}, with charges and records", "placements", "1/s", [len(took) / sum(took) for took in rounds]
        )


class _Cluster:
    """Workers with random loads and rates, eight on a host; chains at one prefill and one decode worker each."""

    def __init__(self, prefill: int, decode: int, chains: Sequence[tuple[BlockHash, ...]]) -> None:
        self._chains, self._random, self._now, self._number = chains, random.Random(0), 0.0, itertools.count()
        spec = SchedulerSpec(model=MODEL, build="b", policy=Policy(), stale_seconds=1e9)
        self.scheduler, self.view = Scheduler(spec), ClusterView(stale_seconds=1e9)
        roles: list[Role] = ["prefill"] * prefill + ["decode"] * decode
        self._ids = [WorkerId(f"{role}-{place}") for place, role in enumerate(roles)]
        for at, (id_, role) in enumerate(zip(self._ids, roles, strict=True)):
            info = _info(id_, role, f"host-{at % ((prefill + decode) // 8)}")
            self.scheduler.join(info, 0.0)
            self.view.apply(WorkerJoined(info=info, at=0.0))
        held = [[chain for chain in range(len(chains)) if chain % prefill == place] for place in range(prefill)]
        held += [[chain for chain in range(len(chains)) if chain % decode == place] for place in range(decode)]
        for at, mine in enumerate(held):
            self._report(at, tuple(Stored(chains[chain]) for chain in mine))

    def report(self) -> None:
        """All workers, once more."""
        for at in range(len(self._ids)):
            self._report(at, ())

    def place(self, shape: RequestShape) -> Decision:
        """What a decision costs, and counting it."""
        self.view.apply(TimePassed(at=self._now))
        decision = place(self.view, shape, Policy(), self._now)
        self.view.apply(decision.placed)
        return decision

    def schedule(self, shape: RequestShape) -> None:
        """As a front's call does, short of the actor."""
        self.scheduler.place(shape, self._now)

    def timed(self, act: Callable[[RequestShape], object]) -> Iterator[float]:
        """CPU seconds of each; a thousand a second, with a report of each worker every half."""
        for shape in [self.shape() for _ in range(PLACEMENTS)]:
            number = next(self._number)
            if number % 500 == 0:
                self.report()
            self._now = 1e-3 * number
            began = time.process_time()
            act(shape)
            yield time.process_time() - began

    def shape(self) -> RequestShape:
        """100 blocks: half of the prompts are known whole, a quarter half, a quarter not at all."""
        known = self._random.choice((CHAIN, CHAIN, CHAIN // 2, 0))
        names = _copies(self._random.choice(self._chains)[:known])
        names += tuple(BlockHash(self._random.randbytes(32)) for _ in range(CHAIN - known))
        request = RequestId(f"r{self._random.getrandbits(60)}")
        return RequestShape(request=request, granules=names, prompt_tokens=16 * CHAIN + 5, max_tokens=200)

    def _report(self, place: int, events: tuple[Stored, ...]) -> None:
        drawn = self._random
        running = drawn.randrange(1, 64)
        speed = 0.8 + 0.4 * (place % 7) / 6
        step = StepSample(1, 512.0, 262144.0, 0.0, 0.0, 0.02 * speed)
        beside = StepSample(9, 0.0, 0.0, running, 1600.0 * running, (0.004 + 2e-5 * running) * speed)
        sender = self._ids[drawn.randrange(len(self._ids) // 2)]
        sent = TransferSample(sender, "gloo", 200 << 20, 0.02 * speed, 0.002 * speed)
        load = Load(
            waiting_requests=drawn.randrange(3),
            waiting_tokens=drawn.randrange(4000),
            running_requests=running,
            blocks_free=drawn.randrange(50_000),
            blocks_held=100 * running,
        )
        known = self.view.workers[self._ids[place]].number
        told = Report(
            worker=self._ids[place],
            epoch=1,
            number=0 if known is None else known + 1,
            load=load,
            counters=Counters(),
            events=events,
            steps=(step, beside),
            transfers=(sent,),
        )
        self.view.apply(Reported(report=told, at=self._now))
        self.scheduler.report(told, self._now)


# ---- beside brute force ------------------------------------------------------------------------


def _regret() -> Iterator[Figure]:
    """What the choice costs beyond the best of all pairs and single workers, each priced."""
    cluster = _Cluster(500, 500, _chains(1_000))
    regrets: list[float] = []
    for state in range(STATES):
        if state % 10 == 0:
            cluster.report()
        decision = cluster.place(cluster.shape())
        best = _brute_force(decision)
        regrets.append(100 * (decision.considered.way.cost - best) / best)
    yield figure("500 P x 500 D", "regret beside 250,500 ways priced", "%", regrets)


def _brute_force(decision: Decision) -> float:
    sides, hosts = decision.considered.sides, decision.considered.hosts
    near: NDArray[np.bool_] = hosts[:, None] == hosts[None, :]
    pairs: Array = sides.prefill[:, None] + np.where(near, sides.decode[NEAR], sides.decode[FAR])
    return min(
        float(pairs.min()) + sides.late["remote"],
        float(sides.local.min()) + sides.late["local"],
        float(sides.mixed.min()) + sides.late["mixed"],
    )


# ---- beside another index -------------------------------------------------------------------------


def _dynamo() -> Iterator[Figure]:
    python = _dynamo_python()
    if python is None:
        print("LEFT OUT: pip does not find ai-dynamo-runtime here, so nothing stands beside our index")
        return
    for size in EVENT_BLOCKS:
        program = [str(python), index_load.__file__, str(size)]
        found = json.loads(subprocess.run(program, capture_output=True, text=True, timeout=600, check=True).stdout)
        for metric, value in found.items():
            yield figure(f"dynamo RadixTree, {size} blocks an event", metric, "1/s", [value])


def _dynamo_python() -> Path | None:
    folder = ROOT / ".bench" / "dynamo"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    asked = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "ai-dynamo-runtime"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=600, check=False)
    return python if done.returncode == 0 else None


# ---- made up -----------------------------------------------------------------------------------


def _chains(count: int = BLOCKS // CHAIN) -> list[tuple[BlockHash, ...]]:
    return [_chain(chain) for chain in range(count)]


def _chain(chain: int) -> tuple[BlockHash, ...]:
    """Names as long as real ones, and made as quickly."""
    drawn = random.Random(chain).randbytes(32 * CHAIN)
    return tuple(BlockHash(drawn[at : at + 32]) for at in range(0, len(drawn), 32))


def _copies(names: Sequence[BlockHash]) -> tuple[BlockHash, ...]:
    """Other objects with the same content, as they come out of a pickle."""
    return tuple(BlockHash(bytes(bytearray(name))) for name in names)


def _worker(number: int) -> WorkerId:
    return WorkerId(f"w{number}")


def _info(id_: WorkerId, role: Role, host: str) -> WorkerInfo:
    return WorkerInfo(
        id=id_,
        role=role,
        epoch=1,
        build="b",
        model_digest="d",
        layout=LAYOUT,
        blocks=50_000,
        max_context=131_072,
        device="cuda",
        host=host,
        pid=1,
        threads=1,
    )


if __name__ == "__main__":
    main()
