"""Who is struck, how, and in which phase of its requests: every answer ends in time, with the undisturbed run's tokens.

`make bench-faults` runs all of it and prints a table; the fast suite a few of its rows. A cluster of two workers in
each pool and two fronts, fp32. Only who spoke through a front that was killed or frozen may hear an error.
"""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from diptych import Client
from diptych.errors import ServingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psutil

    from diptych.v1.admin_pb2 import WorkerStatus
    from tests.e2e.conftest import Cluster, Start

pytestmark = pytest.mark.e2e

LEASE_SECONDS = 2.5
WAIT_SECONDS = 90
"""For any answer: detection, a successor, and what is left to compute on a busy machine."""
VICTIMS = ("prefill-0", "decode-0", "scheduler", "front-0")
FAULTS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
FAST = {("decode-0", "KILL", "decoding"), ("prefill-0", "STOP", "transferring"), ("front-0", "KILL", "decoding")}


@dataclass(frozen=True)
class Phase:
    """What is asked so that many requests are in a phase at once, and how one sees it."""

    prompt: int
    tokens: int
    requests: int
    is_on: Callable[[dict[str, WorkerStatus]], bool]


def total(workers: dict[str, WorkerStatus], role: str, what: str) -> int:
    return sum(getattr(worker.load, what) for name, worker in workers.items() if name.startswith(role))


PHASES = {
    "queued": Phase(400, 200, 40, lambda now: total(now, "", "waiting_requests") > 2),
    "prefilling": Phase(6000, 20, 6, lambda now: total(now, "prefill", "waiting_tokens") > 1000),
    "prefilled": Phase(1500, 600, 16, lambda now: total(now, "prefill", "blocks_lent") > 0),
    "transferring": Phase(6000, 40, 6, lambda now: total(now, "decode", "blocks_granted") > 0),
    "decoding": Phase(50, 1500, 8, lambda now: total(now, "decode", "running_requests") > 3),
}


@dataclass
class Hall:
    """The cluster, a client of each front, and what undisturbed runs said."""

    cluster: Cluster
    clients: tuple[Client, Client]
    rows: list[str] = field(default_factory=list)
    expected: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)

    def workers(self) -> dict[str, WorkerStatus]:
        return {worker.info.id: worker for worker in self.clients[1].status().workers}

    def asks(self, name: str, run: str) -> list[dict[str, Any]]:
        """Of a tenant of its own: nothing that another run left in a cache is found."""
        phase, dice = PHASES[name], random.Random(name)
        return [
            {
                "tokens": dice.choices(range(3, 256), k=phase.prompt),
                "max_tokens": phase.tokens,
                "temperature": (0, 1.0)[place % 2],
                "seed": place,
                "ignore_eos": True,
                "tenant": run,
            }
            for place in range(phase.requests)
        ]

    def undisturbed(self, name: str) -> list[tuple[int, ...]]:
        if name not in self.expected:
            self.expected[name] = [spoken(self.clients[1], ask) for ask in self.asks(name, "undisturbed")]
        return self.expected[name]

    def pid(self, victim: str) -> int:
        if victim in (workers := self.workers()):
            return workers[victim].info.pid
        if victim == "scheduler":
            return only(process for process in self.cluster.processes() if named(process, "SchedulerActor"))
        port = int(self.cluster.grpc.rpartition(":")[2])
        return only(process for process in self.cluster.processes() if listens(process, port))

    def until(self, true: Callable[[dict[str, WorkerStatus]], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not true(self.workers()):
            assert time.monotonic() < deadline, f"waited {WAIT_SECONDS} s until {what}\n{self.cluster.tail()}"
            time.sleep(0.02)

    def whole(self) -> None:
        """Everyone is back, idle, and holds nothing."""

        def is_whole(workers: dict[str, WorkerStatus]) -> bool:
            return len(workers) == 4 and all(worker.alive for worker in workers.values())

        self.until(is_whole, "everyone is back")
        spoken(self.clients[0], {"tokens": [5, 6, 7], "max_tokens": 2})
        for worker in self.cluster.at_rest().values():
            assert worker.counters.leaked_blocks == 0


def only(processes: Iterator[psutil.Process]) -> int:
    [process] = processes
    return process.pid


def named(process: psutil.Process, name: str) -> bool:
    return name in " ".join(process.cmdline())


def listens(process: psutil.Process, port: int) -> bool:
    return any(each.status == "LISTEN" and each.laddr.port == port for each in process.net_connections("tcp"))


def spoken(client: Client, ask: dict[str, Any]) -> tuple[int, ...]:
    return tuple(token for response in client.generate(**ask) for token in response.chunk.token_ids)


@pytest.fixture(scope="module")
def hall(cluster: Start) -> Iterator[Hall]:
    keys = (
        "model.dtype=fp32",
        "placement.how=remote",
        "engine.threads=1",
        "engine.max_running=8",
        "engine.max_batch_tokens=32",
    )
    settings = [
        part
        for key in (*keys, f"kv.lease_seconds={LEASE_SECONDS}", "kv.memory=16MiB", "cluster.max_deaths=1000")
        for part in ("--set", key)
    ]
    with cluster("--model", "random:tiny", "--prefill", "2", "--decode", "2", "--fronts", "2", *settings) as running:
        assert running.process.stdout is not None
        said = [running.process.stdout.readline() for _ in range(2)]
        second = Client(said[1].split()[-1], timeout_seconds=WAIT_SECONDS)
        built = Hall(running, (running.client, second))
        yield built
        second.close()
        print(
            "\n"
            + "\n".join(
                [f"{'victim':<12}{'fault':<8}{'phase':<14}{'exact':>7}{'cut off':>9}{'slowest s':>11}", *built.rows]
            )
        )


def cases() -> list[Any]:
    return [
        pytest.param(*case, marks=() if case in FAST else (pytest.mark.full,), id="-".join(case))
        for case in product(VICTIMS, FAULTS, PHASES)
    ]


@pytest.mark.parametrize(("victim", "fault", "phase"), cases())
def test_nobody_but_a_struck_front_costs_an_answer(hall: Hall, victim: str, fault: str, phase: str) -> None:
    expected, asks = hall.undisturbed(phase), hall.asks(phase, f"{victim} {fault}")
    began = time.monotonic()
    with ThreadPoolExecutor(len(asks)) as threads:
        running = [threads.submit(spoken, hall.clients[place % 2], ask) for place, ask in enumerate(asks)]
        hall.until(
            lambda now: PHASES[phase].is_on(now) or all(each.done() for each in running), f"requests are {phase}"
        )
        assert not all(each.done() for each in running), f"nobody was seen {phase}"
        os.kill(hall.pid(victim), FAULTS[fault])
        outcomes = [each.exception(WAIT_SECONDS) or each.result() for each in running]
    slowest = time.monotonic() - began
    cut_off = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
    for place in cut_off:
        assert victim == "front-0", f"request {place}: {outcomes[place]!r}\n{hall.cluster.tail()}"
        assert place % 2 == 0, f"request {place} came through the other front: {outcomes[place]!r}"
        assert isinstance(outcomes[place], (ServingError, ConnectionError, grpc.RpcError))
    wrong = [place for place, outcome in enumerate(outcomes) if place not in cut_off and outcome != expected[place]]
    assert not wrong, f"requests {wrong} got other tokens"
    exact = len(asks) - len(cut_off)
    hall.rows.append(f"{victim:<12}{fault:<8}{phase:<14}{exact:>7}{len(cut_off):>9}{slowest:>11.1f}")
    hall.whole()
