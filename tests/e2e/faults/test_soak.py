"""Hours of bad luck in minutes: requests of all kinds at four fifths of what the cluster bears, and worker after worker
dies. No answer is wrong or missing, and nobody who lives on grows.

`make bench-soak REQUESTS=500 DEATHS=5` is a short one, and both are the least: it ends when it had enough of either.
Requests come when they come (open loop, exponential gaps), but
at most `MOST_UNDER_WAY` at once: a machine that others use may be slower than it was when its capacity was measured.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest

from diptych import AsyncClient
from diptych.errors import ServingError
from tests.e2e.faults.memory import Memory, listens, long_lived

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Cluster, Start

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
DEATHS = int(os.environ.get("SOAK_DEATHS", "100"))
LOAD = 0.8
CANCELLED, SLOW, STOPPED = 0.1, 0.05, 0.15
FRONT_DEATHS = 0.05
"""Of all deaths: the second front's. The first one's memory is watched."""
KINDS = 200
"""Different requests, each of many tenants: some find their prompt in a cache."""
MOST_UNDER_WAY = 400
MEASURED = 400
"""Requests that measure the capacity, 32 at a time."""
BOUND_SECONDS = 180
LEASE_SECONDS = 2.5
GROWTH = 1.02
LOST = (ServingError, ConnectionError, grpc.RpcError)

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(600 + 2 * REQUESTS)]


@dataclass(frozen=True)
class Kind:
    """A request, and how its client behaves."""

    ask: dict[str, Any]
    cancelled_after: int | None
    slow: bool


def kinds() -> list[Kind]:
    dice = random.Random(8)
    return [_kind(dice, number) for number in range(KINDS)]


def _kind(dice: random.Random, number: int) -> Kind:
    prompt, tokens = dice.choice((20, 60, 200, 700)), dice.choice((1, 10, 30, 80))
    nature = dice.random()
    ask = {
        "tokens": dice.choices(range(3, 256), k=prompt),
        "max_tokens": tokens,
        "temperature": dice.choice((0, 1.0)),
        "seed": number,
        "ignore_eos": True,
    }
    cancelled = nature < CANCELLED and tokens > 1
    return Kind(ask, dice.randrange(tokens) if cancelled else None, slow=CANCELLED <= nature < CANCELLED + SLOW)


@dataclass
class Tally:
    """How requests ended."""

    exact: int = 0
    cancelled: int = 0
    cut_off: int = 0
    """With their front."""
    wrong: list[str] = field(default_factory=list[str])
    seconds: list[float] = field(default_factory=list[float])
    under_way: int = 0
    most_under_way: int = 0


class Soak:
    """One run. Lives on one event loop."""

    def __init__(self, cluster: Cluster, second: str) -> None:
        self.cluster = cluster
        self.kinds = kinds()
        self.clients = [AsyncClient(target, timeout_seconds=BOUND_SECONDS) for target in (cluster.grpc, second)]
        self.expected: list[list[int]] = []
        self.tally = Tally()
        self.sent = 0
        self.deaths: list[str] = []
        self.dice = random.Random(9)
        self._room = asyncio.Semaphore(MOST_UNDER_WAY)

    async def said(self, kind: Kind, front: int, tenant: str) -> list[int]:
        heard: list[int] = []
        answer = self.clients[front].generate(**kind.ask, tenant=tenant)
        try:
            async for response in answer:
                heard += response.chunk.token_ids
                if kind.cancelled_after is not None and len(heard) > kind.cancelled_after:
                    break
                if kind.slow:
                    await asyncio.sleep(0.1)
        finally:
            await answer.aclose()
        return heard

    async def undisturbed(self) -> None:
        whole = (Kind(kind.ask, None, slow=False) for kind in self.kinds)
        self.expected = await asyncio.gather(*(self.said(kind, 0, "undisturbed") for kind in whole))

    async def capacity(self) -> float:
        """Requests per second when there are always 32."""
        numbers, began = iter(range(MEASURED)), time.monotonic()

        async def client() -> None:
            for number in numbers:
                kind = Kind(self.kinds[number % KINDS].ask, None, slow=False)
                await self.said(kind, number % 2, f"capacity {number}")

        await asyncio.gather(*(client() for _ in range(32)))
        return MEASURED / (time.monotonic() - began)

    async def one(self, number: int) -> None:
        which = self.dice.randrange(KINDS)
        kind, front, expected = self.kinds[which], number % 2, self.expected[which]
        began, deaths = time.monotonic(), len(self.deaths)
        self.tally.under_way += 1
        self.tally.most_under_way = max(self.tally.most_under_way, self.tally.under_way)
        try:
            heard = await self.said(kind, front, f"tenant {number % 50}")
        except LOST as error:
            if front == 1 and "front-1" in self.deaths[max(0, deaths - 1) :]:
                self.tally.cut_off += 1
            else:
                self.tally.wrong.append(
                    f"request {number}, kind {which}, after {time.monotonic() - began:.1f} s: {error!r}"
                )
            return
        finally:
            self.tally.under_way -= 1
            self._room.release()
        if heard != expected[: len(heard)] or (kind.cancelled_after is None and len(heard) != len(expected)):
            self.tally.wrong.append(f"request {number}, kind {which}: {heard} instead of {expected}")
        elif kind.cancelled_after is not None:
            self.tally.cancelled += 1
        else:
            self.tally.exact += 1
            self.tally.seconds.append(time.monotonic() - began)

    async def all_requests(self, rate: float) -> None:
        running = set[asyncio.Task[None]]()
        while self.sent < REQUESTS or len(self.deaths) < DEATHS:
            await asyncio.sleep(self.dice.expovariate(rate))
            await self._room.acquire()
            task = asyncio.create_task(self.one(self.sent))
            self.sent += 1
            running.add(task)
            task.add_done_callback(running.discard)
        if running:
            await asyncio.wait(running)

    # ---- deaths ---------------------------------------------------------------------------------------

    async def deaths_in(self, requests: asyncio.Task[None]) -> None:
        """One after the other, each when the last victim is back."""
        while not requests.done() and len(self.deaths) < DEATHS:
            victim, pid = await self._victim()
            self.deaths.append(victim)
            os.kill(pid, signal.SIGSTOP if self.dice.random() < STOPPED else signal.SIGKILL)
            await self._wait_back(victim, pid)

    async def _victim(self) -> tuple[str, int]:
        if self.dice.random() < FRONT_DEATHS:
            return "front-1", self._front_pid()
        status = await self.clients[0].status()
        worker = self.dice.choice(status.workers)
        return worker.info.id, worker.info.pid

    def _front_pid(self) -> int:
        port = int(self.clients[1]._target.rpartition(":")[2])
        [pid] = [process.pid for process in self.cluster.processes() if listens(process, port)]
        return pid

    async def _wait_back(self, victim: str, pid: int) -> None:
        deadline = time.monotonic() + BOUND_SECONDS
        while not await self._is_back(victim, pid):
            assert time.monotonic() < deadline, f"{victim} does not come back\n{self.cluster.tail()}"
            await asyncio.sleep(0.1)

    async def _is_back(self, victim: str, pid: int) -> bool:
        try:
            status = await self.clients[1 if victim == "front-1" else 0].status()
        except LOST:
            return False
        if victim == "front-1":
            return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        infos = {worker.info.id: worker.info for worker in status.workers if worker.alive}
        return len(infos) == 4 and infos[victim].pid != pid

    # ---- all ------------------------------------------------------------------------------------------

    async def run(self, memory: Memory) -> None:
        await self.undisturbed()
        rate = LOAD * await self.capacity()
        print(f"\n{rate / LOAD:.1f} requests/s at most; {REQUESTS} at {rate:.1f}/s", flush=True)
        began = time.monotonic()
        requests = asyncio.create_task(self.all_requests(rate))
        deaths = asyncio.create_task(self.deaths_in(requests))
        told = 0
        while not requests.done():
            memory.look()
            if deaths.done():
                deaths.result()  # it may have given up
            if (tenth := int(10 * self.ended / REQUESTS)) > told:
                told = tenth
                print(self._line(time.monotonic() - began), flush=True)
            await asyncio.wait({requests}, timeout=2)
        await requests
        await deaths
        print(self._line(time.monotonic() - began), flush=True)
        for client in self.clients:
            await client.close()

    @property
    def ended(self) -> int:
        tally = self.tally
        return tally.exact + tally.cancelled + tally.cut_off + len(tally.wrong)

    def _line(self, seconds: float) -> str:
        tally, times = self.tally, sorted(self.tally.seconds) or [0.0]
        return (
            f"{seconds:6.0f} s: {tally.exact} exact, {tally.cancelled} cancelled, {tally.cut_off} cut off with their "
            f"front, {len(tally.wrong)} wrong; {len(self.deaths)} deaths; median {statistics.median(times):.2f} s, "
            f"99 % {times[int(len(times) * 0.99)]:.1f} s, longest {times[-1]:.1f} s; {tally.most_under_way} at once"
        )


@pytest.fixture
def running(cluster: Start) -> Iterator[tuple[Cluster, str]]:
    keys = (
        "model.dtype=fp32",
        "engine.threads=1",
        "kv.memory=16MiB",
        f"kv.lease_seconds={LEASE_SECONDS}",
        "cluster.max_deaths=100000",
        "admission.queue.normal=20000",
    )
    settings = [part for key in keys for part in ("--set", key)]
    with cluster("--model", "random:tiny", "--prefill", "2", "--decode", "2", "--fronts", "2", *settings) as it:
        assert it.process.stdout is not None
        said = [it.process.stdout.readline() for _ in range(2)]
        yield it, said[1].split()[-1]


def test_worker_after_worker_dies_and_no_answer_is_wrong_or_missing(running: tuple[Cluster, str]) -> None:
    cluster, second = running
    port = int(second.rpartition(":")[2])
    watched = {pid: name for pid, name in long_lived(cluster).items() if not listens(psutil.Process(pid), port)}
    memory = Memory(watched)

    async def test() -> Soak:
        soak = Soak(cluster, second)
        await soak.run(memory)
        return soak

    soak = asyncio.run(test())
    for name, before, after in memory.table():
        print(f"{name:<40}{before:>9.1f} MiB{after:>9.1f} MiB {after / before - 1:+.2%}")
    assert not soak.tally.wrong, soak.tally.wrong[:5]
    assert soak.ended == soak.sent
    cluster.at_rest()
    grown = [name for name, before, after in memory.table() if after > before * GROWTH]
    assert not grown, f"{grown} grew"
