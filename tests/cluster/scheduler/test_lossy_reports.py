"""What the scheduler believes of every cache, when reports are dropped, late, doubled and out of order."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.front.dispatcher import Dispatcher, FrontIdentity
from cluster.front.service import Ask
from cluster.front.tokenizer import TextModel
from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from diptych.build import build_identity
from diptych.errors import WorkerLost
from diptych.hashing import KvIdentity
from diptych.types import (
    BlockHash,
    ClusterStatus,
    Explanation,
    FrontId,
    ModelSource,
    Outcome,
    Placement,
    Report,
    RequestId,
    Role,
    SamplingParams,
    WorkerId,
    WorkerSpec,
)
from workers.report_pace import HEARTBEAT_SECONDS
from workers.transfer.acquaintance import Neighbours
from workers.worker import Worker

if TYPE_CHECKING:
    from workers.engine_thread import Roles

TINY = ModelSource(name="tiny", path="random:tiny", digest="abcdef0123456789")
ROOT = KvIdentity(model_digest=TINY.digest, weight_format="fp32", kv_dtype="fp32").root()
WAIT_SECONDS = 60.0
AT_ONCE = 8
BLOCKS = 60
"""Of each worker: a few prompts' worth, so that caches turn over."""
Answer = tuple[tuple[int, bytes], ...]
"""Its tokens, each with a hash of the logits that it came from."""
ROLES: dict[str, Role] = {**{f"p{at}": "prefill" for at in range(4)}, **{f"d{at}": "decode" for at in range(4)}}


class LossyWire:
    """Between the workers and a scheduler in this process."""

    def __init__(self, chance: random.Random) -> None:
        spec = SchedulerSpec(model=TINY, build=build_identity(), policy=Policy(), stale_seconds=WAIT_SECONDS)
        self.scheduler = Scheduler(spec)
        self.quiet = False
        self.mishaps: Counter[str] = Counter()
        self.heard: Counter[WorkerId] = Counter()
        self._late: list[Report] = []
        self._chance = chance

    async def report(self, report: Report) -> bool:
        """Whether it says that the next one has to be full: a lost report's answer is made up."""
        mishap = "none" if self.quiet else self._chance.choice(("none", "dropped", "doubled", "late", "unanswered"))
        self.mishaps[mishap] += 1
        match mishap:
            case "dropped":
                return False
            case "doubled":
                self._deliver(report)
            case "late":
                self._late.append(report)
                return False
            case "unanswered":
                self._deliver(report)
                raise WorkerLost("nobody knows whether that arrived")
            case _:
                pass
        self._deliver_late(1)
        return self._deliver(report)

    def calm_down(self) -> None:
        """From now on every report arrives, and those under way do, in whatever order."""
        self._deliver_late(len(self._late))
        self.quiet = True
        self.heard.clear()

    def _deliver_late(self, count: int) -> None:
        for _ in range(min(count, len(self._late))):
            self._deliver(self._late.pop(self._chance.randrange(len(self._late))))

    def _deliver(self, report: Report) -> bool:
        self.heard[report.worker] += 1
        return self.scheduler.report(report, time.monotonic())

    # ---- cluster.front.dispatcher.SchedulerPort -----------------------------------------------------

    async def place(self, shape: RequestShape) -> Placement:
        return self.scheduler.place(shape, time.monotonic())

    async def status(self) -> ClusterStatus:
        return self.scheduler.status(time.monotonic())

    async def finished(self, outcomes: tuple[Outcome, ...]) -> None:
        for outcome in outcomes:
            self.scheduler.finished(outcome, time.monotonic())

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        return self.scheduler.explain(request, time.monotonic())

    def believed(self, worker: str) -> set[BlockHash]:
        """The names that the index says are there."""
        runs = self.scheduler._view._index._members[WorkerId(worker)].runs
        return {name for run in runs for name in run.names}


class Fleet:
    """Workers that may be cleared and restarted, a front before them, and the wire."""

    def __init__(self, text: TextModel, wire: LossyWire) -> None:
        self.wire = wire
        identity = FrontIdentity(
            id=FrontId("front"), model="tiny", root=ROOT, patience_seconds=10.0, recovery_seconds=10.0
        )
        self.dispatcher = Dispatcher(identity, text, wire)
        self.neighbours = Neighbours()
        self.workers: dict[str, Worker] = {}

    async def start(self, names: dict[str, Role]) -> None:
        epochs = {name: self.workers[name].spec.epoch + 1 if name in self.workers else 0 for name in names}
        born = {name: Worker(_spec(name, role, epochs[name]), self.neighbours) for name, role in names.items()}
        infos = await asyncio.gather(*(worker.start() for worker in born.values()))
        self.workers |= born
        for info in infos:
            self.wire.scheduler.join(info, time.monotonic())
            self.workers[info.id].report_to(self.wire.report)
        peers: dict[str, Any] = dict(self.workers)
        for name, worker in self.workers.items():
            await worker.meet({WorkerId(other): peer for other, peer in peers.items() if other != name})
        await self.dispatcher.meet({WorkerId(name): (it.info, it) for name, it in peers.items()})

    async def restart(self, name: str) -> None:
        """Its requests go on elsewhere, and a new incarnation joins."""
        worker = self.workers[name]
        self.wire.scheduler.leave(worker.spec.id, worker.spec.epoch)
        await worker.stop()
        await self.start({name: worker.spec.role})

    def clear(self, name: str) -> None:
        worker = self.workers[name]
        worker._engine.post(lambda: worker._roles.engine.pool.clear())

    async def answer(self, number: int, tokens: tuple[int, ...]) -> Answer:
        ask = Ask(
            id=RequestId(f"r{number}"),
            tokens=tokens,
            params=SamplingParams(max_tokens=6, temperature=0.0, fingerprint=True),
        )
        return tuple(
            [
                token
                async for delta in self.dispatcher.generate(ask)
                for token in zip(delta.tokens, delta.fingerprints, strict=True)
            ]
        )

    async def truth(self, name: str) -> set[BlockHash]:
        """What its pool has, between two steps."""
        loop, worker = asyncio.get_running_loop(), self.workers[name]
        seen: asyncio.Future[set[BlockHash]] = loop.create_future()

        def look(roles: Roles) -> None:
            loop.call_soon_threadsafe(seen.set_result, set(roles.engine.pool.snapshot()))

        worker._engine.post(look, worker._roles)
        return await seen

    async def until_known(self) -> dict[str, int]:
        """Until the index is the truth; how many reports of each worker that took."""
        took: dict[str, int] = {}
        while len(took) < len(self.workers):
            for name in self.workers.keys() - took.keys():
                if self.wire.believed(name) == await self.truth(name):
                    took[name] = self.wire.heard[WorkerId(name)]
            await asyncio.sleep(0.002)
        return took

    async def stop(self) -> None:
        await self.dispatcher.close()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))


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
        secret=b"s",
        lease_seconds=5.0,
        cache="",
    )


@asynccontextmanager
async def fleet_of(text: TextModel, roles: dict[str, Role], chance: random.Random) -> AsyncIterator[Fleet]:
    fleet = Fleet(text, LossyWire(chance))
    await fleet.start(roles)
    try:
        yield fleet
    finally:
        await fleet.stop()


def prompts(chance: random.Random, count: int) -> list[tuple[int, ...]]:
    """Conversations that grow, over a few prompts that many share, and some that nobody shares."""
    systems = [tuple(chance.choices(range(250), k=length)) for length in (40, 96, 160)]
    talks = [chance.choice(systems) for _ in range(6)]
    asked: list[tuple[int, ...]] = []
    for _ in range(count):
        at = chance.randrange(len(talks))
        talks[at] = (*talks[at], *chance.choices(range(250), k=chance.randrange(5, 60)))
        asked.append(talks[at])
        if len(talks[at]) > 400:
            talks[at] = chance.choice(systems)
    return asked


async def ask_all(fleet: Fleet, asked: list[tuple[int, ...]], trouble: Any) -> list[Answer]:
    """A few at a time, with `trouble(number)` before each."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, tokens: tuple[int, ...]) -> Answer:
        async with gate:
            await trouble(number)
            return await fleet.answer(number, tokens)

    return await asyncio.gather(*(one(number, tokens) for number, tokens in enumerate(asked)))


async def no_trouble(_: int) -> None:
    """Nothing happens."""


@pytest.fixture
def text() -> TextModel:
    return TextModel.load(TINY)


def check_truth_survives(text: TextModel, seed: int, count: int) -> None:
    chance = random.Random(seed)
    asked = prompts(chance, count)

    async def calm() -> list[Answer]:
        async with fleet_of(text, {"p0": "prefill", "d0": "decode"}, chance) as fleet:
            fleet.wire.quiet = True
            return await ask_all(fleet, asked, no_trouble)

    async def wild() -> None:
        async with fleet_of(text, ROLES, chance) as fleet:

            async def trouble(number: int) -> None:
                if number % 7 == 3:
                    fleet.clear(chance.choice(list(ROLES)))
                if number % (count // 3) == count // 6:
                    await fleet.restart(chance.choice(list(ROLES)))

            said = await ask_all(fleet, asked, trouble)
            wire = fleet.wire
            assert all(wire.mishaps[name] > 3 for name in ("dropped", "doubled", "late", "unanswered"))
            assert said == expected
            wire.calm_down()
            # One may be under way, another's answer lost before; the next shows the gap; then, at once, one tells all.
            assert max((await fleet.until_known()).values()) <= 4
            wire.scheduler.check()
            assert sum(len(wire.believed(name)) for name in ROLES) > BLOCKS

    torch.set_num_threads(1)
    expected = asyncio.run(asyncio.wait_for(calm(), WAIT_SECONDS))
    assert all(len(answer) == 6 for answer in expected)
    asyncio.run(asyncio.wait_for(wild(), WAIT_SECONDS))


def test_the_index_is_the_workers_truth_again_soon_after_the_wire_is_quiet(text: TextModel) -> None:
    assert HEARTBEAT_SECONDS < 1.0, "an idle worker whose last report was lost is found out within a second"
    check_truth_survives(text, seed=1, count=60)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 12))
def test_the_truth_survives_whatever_is_lost(text: TextModel, seed: int) -> None:
    check_truth_survives(text, seed, count=150)
