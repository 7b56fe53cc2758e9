"""A cluster under Ray whose reports to the scheduler are dropped, late, doubled, out of order and unanswered.

    python tests/e2e/live/lossy_cluster.py SEED REQUESTS

Four prefill and four decode workers in processes of their own, the real scheduler and front as actors, clients over
gRPC. First every prompt is answered undisturbed; then all are asked again while reports get lost, caches are cleared
and workers killed. Prints what happened, and fails when an answer differs or the index isn't the workers' truth in the
end.
A script and no module: Ray sends what is defined in it to the actors by value.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray

from cluster.config.values import Address
from cluster.front.actor import FrontActor, FrontSpec
from cluster.front.dispatcher import FrontIdentity
from cluster.pools.processes import actor_options
from cluster.scheduler.actor import SchedulerActor
from cluster.scheduler.costs import Policy
from cluster.scheduler.scheduler import SchedulerSpec
from diptych import Client
from diptych.build import build_identity
from diptych.errors import WorkerLost
from diptych.hashing import KvIdentity
from diptych.types import FrontId, ModelSource, WorkerId, WorkerSpec
from workers.actors import CONTROL, WorkerActor

if TYPE_CHECKING:
    from diptych.types import BlockHash, Report, Role
    from workers.engine_thread import Roles

TINY = ModelSource(name="tiny", path="random:tiny", digest="abcdef0123456789")
SECRET = b"of this test"
BLOCKS = 60
"""Of each worker: a few prompts' worth, so that caches turn over."""
CLIENTS, TOKENS, WAIT_SECONDS, MOST_REPORTS = 6, 6, 240, 4
ROLES: dict[str, Role] = {**{f"p{at}": "prefill" for at in range(4)}, **{f"d{at}": "decode" for at in range(4)}}
Answer = tuple[tuple[int, ...], tuple[bytes, ...]]
"""Its tokens, and a hash of the logits that each came from."""


class LossyScheduler(SchedulerActor):
    """Loses what it is told, until it is calm."""

    def __init__(self, spec: SchedulerSpec, seed: int) -> None:
        super().__init__(spec)
        self._chance, self._is_calm, self._late = random.Random(seed), True, list[Any]()
        self._mishaps, self._heard = Counter[str](), Counter[str]()

    async def report(self, report: Report) -> bool:
        names = ("none", "dropped", "doubled", "late", "unanswered")
        mishap = "none" if self._is_calm else self._chance.choice(names)
        self._mishaps[mishap] += 1
        if mishap == "dropped":
            return False
        if mishap == "late":
            self._late.append(report)
            return False
        needs_full = await self._deliver(report)
        if mishap == "doubled":
            await self._deliver(report)
        if mishap == "unanswered":
            raise WorkerLost("nobody knows whether that arrived")
        if self._late:
            await self._deliver(self._late.pop(self._chance.randrange(len(self._late))))
        return needs_full

    async def turn(self, *, calm: bool) -> dict[str, int]:
        """Calm or not from now on; what happened so far."""
        while calm and self._late:
            await self._deliver(self._late.pop(self._chance.randrange(len(self._late))))
        self._is_calm = calm
        self._heard.clear()
        return dict(self._mishaps)

    async def believed(self, worker: str) -> tuple[set[BlockHash], int]:
        """What the index says is there, and how many reports of it came since the last turn."""
        self._scheduler.check()
        runs = self._scheduler._view._index._members[WorkerId(worker)].runs
        return {name for run in runs for name in run.names}, self._heard[worker]

    async def _deliver(self, report: Report) -> bool:
        self._heard[str(report.worker)] += 1
        return await super().report(report)


class OpenWorker(WorkerActor):
    """Can be looked into and cleared."""

    async def truth(self) -> set[BlockHash]:
        """What its pool has, between two steps."""
        loop, worker = asyncio.get_running_loop(), self._it
        seen: asyncio.Future[set[BlockHash]] = loop.create_future()

        def look(roles: Roles) -> None:
            loop.call_soon_threadsafe(seen.set_result, set(roles.engine.pool.snapshot()))

        worker._engine.post(look, worker._roles)
        return await seen

    async def clear(self) -> None:
        worker = self._it
        worker._engine.post(lambda: worker._roles.engine.pool.clear())


class LiveCluster:
    """Its owner: as `cluster.pools` is, without what this test has no use for."""

    def __init__(self, seed: int) -> None:
        # An actor that the driver defines needs the tree's roots, as all ours do.
        spec = SchedulerSpec(model=TINY, build=build_identity(), policy=Policy(), stale_seconds=60.0)
        self.scheduler = ray.remote(**actor_options())(LossyScheduler).remote(spec, seed)
        root = KvIdentity(model_digest=TINY.digest, weight_format="fp32", kv_dtype="fp32").root()
        identity = FrontIdentity(
            id=FrontId("front"), model="tiny", root=root, patience_seconds=30.0, recovery_seconds=30.0
        )
        anywhere = str(Address("127.0.0.1", 0))
        front = FrontSpec(
            identity=identity,
            model=TINY,
            http=anywhere,
            grpc=anywhere,
            log_level="warning",
            log_prompts=False,
            grace_seconds=5,
            secret=SECRET,
        )
        self.front = ray.remote(**actor_options())(FrontActor).remote(front)
        self.workers: dict[str, Any] = {}
        self.infos: dict[str, Any] = {}
        self.epochs: dict[str, int] = {}

    def open(self) -> str:
        """The front's gRPC address."""
        ray.get(self.front.prepare.remote(self.scheduler))
        self.start(ROLES)
        return f"127.0.0.1:{ray.get(self.front.open.remote()).grpc}"

    def start(self, names: dict[str, Role]) -> None:
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        options = actor_options(environment) | {"concurrency_groups": {CONTROL: 1000}}
        for name, role in names.items():
            self.epochs[name] = self.epochs.get(name, -1) + 1
            self.workers[name] = ray.remote(**options)(OpenWorker).remote(_spec(name, role, self.epochs[name]))
        born = ray.get([self.workers[name].start.remote() for name in names])
        for name, info in zip(names, born, strict=True):
            self.infos[name] = info
            ray.get(self.scheduler.join.remote(info))
        handles = {WorkerId(name): worker for name, worker in self.workers.items()}
        ray.get([worker.meet.remote({i: h for i, h in handles.items() if i != n}) for n, worker in handles.items()])
        ray.get(self.front.meet.remote({i: (self.infos[i], worker) for i, worker in handles.items()}))
        ray.get([self.workers[name].report_to.remote(self.scheduler) for name in names])

    def restart(self, name: str) -> None:
        """Killed; its requests go on elsewhere, and a new incarnation joins."""
        ray.kill(self.workers.pop(name))
        ray.get(self.scheduler.leave.remote(WorkerId(name), self.epochs[name]))
        rest = {WorkerId(other): (self.infos[other], worker) for other, worker in self.workers.items()}
        ray.get(self.front.meet.remote(rest))
        self.start({name: ROLES[name]})

    def until_known(self) -> tuple[float, int]:
        """Until the index is the truth: seconds, and the most reports that a worker needed."""
        began, took = time.monotonic(), dict[str, int]()
        while len(took) < len(ROLES):
            assert time.monotonic() - began < WAIT_SECONDS, f"{ROLES.keys() - took.keys()} aren't known"
            for name in ROLES.keys() - took.keys():
                believed, heard = ray.get(self.scheduler.believed.remote(name))
                if believed == ray.get(self.workers[name].truth.remote()):
                    took[name] = heard
        return time.monotonic() - began, max(took.values())


def _spec(name: str, role: Role, epoch: int) -> WorkerSpec:
    return WorkerSpec(
        id=WorkerId(name),
        role=role,
        epoch=epoch,
        model=TINY,
        dtype="fp32",
        block_size=16,
        memory_bytes=BLOCKS * 8192,
        max_batch_tokens=256,
        max_running=16,
        threads=1,
        device="cpu",
        host="127.0.0.1",
        link="auto",
        wire="native",
        verify="sample",
        secret=SECRET,
        lease_seconds=10.0,
        cache="",
    )


def prompts(chance: random.Random, count: int) -> list[list[int]]:
    """Conversations that grow, over a few prompts that many share."""
    systems = [chance.choices(range(3, 250), k=length) for length in (40, 96, 160)]
    talks = [chance.choice(systems) for _ in range(6)]
    asked: list[list[int]] = []
    for _ in range(count):
        at = chance.randrange(len(talks))
        talks[at] = [*talks[at], *chance.choices(range(3, 250), k=chance.randrange(5, 60))]
        asked.append(talks[at])
        if len(talks[at]) > 400:
            talks[at] = chance.choice(systems)
    return asked


def answer(client: Client, tokens: list[int]) -> Answer:
    ask = {"tokens": tokens, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "fingerprint": True}
    chunks = [event.chunk for event in client.generate(**ask)]
    return tuple(t for c in chunks for t in c.token_ids), tuple(f for c in chunks for f in c.fingerprints)


def main() -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(seed)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        cluster = LiveCluster(seed)
        client = Client(cluster.open(), timeout_seconds=WAIT_SECONDS)
        asked = prompts(chance, count)
        with ThreadPoolExecutor(CLIENTS) as threads:
            expected = list(threads.map(lambda tokens: answer(client, tokens), asked))
            ray.get(cluster.scheduler.turn.remote(calm=False))
            running = [threads.submit(answer, client, tokens) for tokens in asked]
            restarts = clears = 0
            for number, each in enumerate(running):
                assert each.result(WAIT_SECONDS) == expected[number], f"answer {number} is another one"
                if number % 7 == 3:
                    ray.get(cluster.workers[chance.choice(list(ROLES))].clear.remote())
                    clears += 1
                if number % (count // 3) == count // 6:
                    cluster.restart(chance.choice(list(ROLES)))
                    restarts += 1
        mishaps = ray.get(cluster.scheduler.turn.remote(calm=True))
        seconds, reports = cluster.until_known()
        print(
            f"{count} answers exact, {clears} caches cleared, {restarts} workers killed; reports: {mishaps}; the "
            f"index was the truth {seconds:.2f} s after the wire was calm, after at most {reports} reports of a worker"
        )
        assert all(mishaps.get(name, 0) > 3 for name in ("dropped", "doubled", "late", "unanswered")), mishaps
        assert reports <= MOST_REPORTS, f"{reports} reports until a worker was known, at most {MOST_REPORTS} are needed"
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
