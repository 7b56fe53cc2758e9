"""Who is struck, how, and in which phase of its requests: every answer ends in time, with the undisturbed run's tokens.

`make bench-faults` runs all of it and prints a table; the fast suite a few of its rows. One cluster of two workers in
each pool and two fronts, fp32, is struck again and again: it is whole before the next row, with as many processes as in
the beginning. Only who spoke through a front that was killed or frozen may hear an error.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest

from diptych import Client
from diptych.errors import ServingError
from tests.e2e.faults.phases import PHASES, RUNNING, TRIES, WAIT_SECONDS, Seen, Stream, asks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.v1.admin_pb2 import WorkerStatus
    from tests.e2e.conftest import Cluster, Start

pytestmark = pytest.mark.e2e

LEASE_SECONDS = 2.5
ACTORS = {"WorkerActor": 4, "FrontActor": 2, "SchedulerActor": 1}
VICTIMS = ("prefill-0", "decode-0", "scheduler", "front-0")
FAULTS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
FAST = {("decode-0", "KILL", "decoding"), ("prefill-0", "STOP", "transferring"), ("front-0", "KILL", "decoding")}


@dataclass
class Hall:
    """The cluster, a client of each front, and what undisturbed runs said."""

    cluster: Cluster
    clients: tuple[Client, Client]
    rows: list[str] = field(default_factory=list)
    expected: dict[str, list[list[int]]] = field(default_factory=dict)

    def actors(self) -> Counter[str]:
        """Processes by the name that Ray gives them: `ray::WorkerActor.start` while it starts."""
        words = (title(process).split(":")[-1] for process in self.cluster.processes())
        return Counter(word.partition(".")[0] for word in words if "Actor" in word)

    def workers(self, front: int) -> dict[str, WorkerStatus]:
        return {worker.info.id: worker for worker in self.clients[front].status().workers}

    def undisturbed(self, name: str) -> list[list[int]]:
        if name not in self.expected:
            with ThreadPoolExecutor(PHASES[name].requests) as threads:
                streams = [Stream(self.clients[1], ask, threads) for ask in asks(name, "undisturbed")]
                assert [stream.wait() for stream in streams] == [None] * len(streams)
            self.expected[name] = [stream.heard for stream in streams]
        return self.expected[name]

    def pid(self, victim: str) -> int:
        if victim in (workers := self.workers(1)):
            return workers[victim].info.pid
        if victim == "scheduler":
            return only(process for process in self.cluster.processes() if "SchedulerActor" in title(process))
        port = int(self.cluster.grpc.rpartition(":")[2])
        return only(process for process in self.cluster.processes() if listens(process, port))

    def saw_phase(self, name: str, streams: list[Stream]) -> bool:
        """False when all were over before anybody looked."""
        front = 0
        while not all(stream.is_over for stream in streams):
            if PHASES[name].is_on(Seen(self.workers(front), [len(stream.heard) for stream in streams])):
                return True
            front = 1 - front  # each serves a status again for a while
            time.sleep(0.02)
        return False

    def wait_whole(self, struck: int) -> None:
        """Everyone is back, idle, and holds nothing; who was struck is gone."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (self._all_are_up() and self.actors() == ACTORS and is_gone(struck)):
            assert time.monotonic() < deadline, f"{struck} was struck; now {self.actors()}\n{self.cluster.tail()}"
            time.sleep(0.1)
        for client in self.clients:
            assert len(spoken(client, {"tokens": [5, 6, 7], "max_tokens": 2})) <= 2
        self.cluster.at_rest()

    def _all_are_up(self) -> bool:
        try:
            workers = self.workers(1)
        except ServingError:
            return False  # the scheduler is stuck
        return len(workers) == 4 and all(worker.alive for worker in workers.values())


def is_gone(pid: int) -> bool:
    """It holds nothing any more. (Ray's raylet leaves zombies.)"""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def only(processes: Iterator[psutil.Process]) -> int:
    [process] = processes
    return process.pid


def title(process: psutil.Process) -> str:
    """Empty when it has ended meanwhile."""
    try:
        return next(iter(process.cmdline()), "")
    except psutil.Error:
        return ""


def listens(process: psutil.Process, port: int) -> bool:
    try:
        return any(each.status == "LISTEN" and each.laddr.port == port for each in process.net_connections("tcp"))
    except psutil.Error:
        return False  # it has ended meanwhile


def spoken(client: Client, ask: dict[str, Any]) -> list[int]:
    """Asked again while its front, which was struck, is not back yet."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return [token for response in client.generate(**ask) for token in response.chunk.token_ids]
        except (ServingError, ConnectionError, grpc.RpcError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="module")
def hall(cluster: Start) -> Iterator[Hall]:
    keys = (
        "model.dtype=fp32",
        "placement.how=remote",
        "engine.threads=1",
        f"engine.max_running={RUNNING}",
        "engine.max_batch_tokens=32",
        f"kv.lease_seconds={LEASE_SECONDS}",
        "kv.memory=16MiB",
        "cluster.max_deaths=1000",
    )
    settings = [part for key in keys for part in ("--set", key)]
    with cluster("--model", "random:tiny", "--prefill", "2", "--decode", "2", "--fronts", "2", *settings) as running:
        assert running.process.stdout is not None
        said = [running.process.stdout.readline() for _ in range(2)]
        second = Client(said[1].split()[-1], timeout_seconds=WAIT_SECONDS)
        built = Hall(running, (running.client, second))
        yield built
        second.close()
        titles = f"{'victim':<12}{'fault':<8}{'phase':<14}{'exact':>7}{'cut off':>9}{'slowest s':>11}{'whole s':>9}"
        print("\n" + "\n".join([titles, *built.rows]))


def cases() -> list[Any]:
    return [
        pytest.param(*case, marks=() if case in FAST else (pytest.mark.full,), id="-".join(case))
        for case in product(VICTIMS, FAULTS, PHASES)
    ]


@pytest.mark.parametrize(("victim", "fault", "phase"), cases())
def test_nobody_but_a_struck_front_costs_an_answer(hall: Hall, victim: str, fault: str, phase: str) -> None:
    expected, struck = hall.undisturbed(phase), hall.pid(victim)
    with ThreadPoolExecutor(PHASES[phase].requests) as threads:
        for attempt in range(TRIES):
            asked = asks(phase, f"{victim} {fault} {attempt}")
            streams = [Stream(hall.clients[place % 2], ask, threads) for place, ask in enumerate(asked)]
            if hall.saw_phase(phase, streams):
                break
        else:
            pytest.fail(f"nobody was seen {phase}")
        began = time.monotonic()
        os.kill(struck, FAULTS[fault])
        errors = [stream.wait() for stream in streams]
    slowest = time.monotonic() - began
    cut_off = [place for place, error in enumerate(errors) if error]
    for place in cut_off:
        assert victim == "front-0", f"request {place}: {errors[place]!r}\n{hall.cluster.tail()}"
        assert place % 2 == 0, f"request {place} came through the other front: {errors[place]!r}"
        assert isinstance(errors[place], (ServingError, ConnectionError, grpc.RpcError))
        heard = streams[place].heard
        assert heard == expected[place][: len(heard)]
    wrong = [place for place, error in enumerate(errors) if not error and streams[place].heard != expected[place]]
    assert not wrong, f"requests {wrong} got other tokens"
    hall.wait_whole(struck)
    exact, whole = len(asked) - len(cut_off), time.monotonic() - began
    hall.rows.append(f"{victim:<12}{fault:<8}{phase:<14}{exact:>7}{len(cut_off):>9}{slowest:>11.1f}{whole:>9.1f}")
    print(hall.rows[-1], flush=True)
