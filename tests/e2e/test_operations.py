"""A cluster operated while it serves: restarted one by one, scaled, given other roles. Its clients don't notice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from diptych import Client
from diptych.errors import InvalidRequest, ServingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diptych.v1.admin_pb2 import GetStatusResponse
    from tests.e2e.conftest import Cluster, Start

pytestmark = pytest.mark.e2e

CLIENTS = 4
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def four(cluster: Start) -> Iterator[Cluster]:
    """Two workers in each pool, fp32."""
    keys = ("model.dtype=fp32", "engine.threads=1", "engine.max_running=16", "kv.memory=32MiB")
    settings = [part for key in keys for part in ("--set", key)]
    pools = ("--prefill", "2", "--decode", "2", "--fronts", "2")
    with cluster("--model", "random:tiny", *pools, *settings) as running:
        yield running


@pytest.fixture(scope="module")
def second(four: Cluster) -> Iterator[Client]:
    """Of the other front."""
    assert four.process.stdout is not None
    said = [four.process.stdout.readline() for _ in range(2)]
    with Client(said[1].split()[-1], timeout_seconds=WAIT_SECONDS) as client:
        yield client


def asks() -> list[dict[str, Any]]:
    dice = random.Random(5)
    return [
        {"tokens": dice.choices(range(3, 256), k=dice.choice((20, 200, 900))), "max_tokens": 150, "temperature": 0}
        for _ in range(12)
    ]


class Load:
    """Clients that ask again and again and compare each answer with what it was before.

    One that a front refuses, because it is about to end, asks the next one, as any balancer does.
    """

    def __init__(self, cluster: Cluster, *others: Client) -> None:
        self._fronts = (cluster.client, *others)
        self._asks = asks()
        self._expected = [cluster.answer(**ask).tokens for ask in self._asks]
        self._over = Event()
        self.answered = 0
        self.refused = 0
        self.longest_pause_seconds = 0.0

    def run(self, number: int) -> int:
        dice, count = random.Random(number), 0
        while not self._over.is_set():
            which = dice.randrange(len(self._asks))
            heard = self._one(self._asks[which], number + count)
            assert tuple(heard) == self._expected[which], f"answer {count} of client {number} is another one"
            count += 1
        return count

    def _one(self, ask: dict[str, Any], turn: int) -> list[int]:
        deadline = time.monotonic() + WAIT_SECONDS
        heard: list[int] = []
        while True:
            try:
                self._read(self._fronts[turn % len(self._fronts)], ask, heard)
                return heard
            except (ServingError, ConnectionError):
                if heard or time.monotonic() > deadline:
                    raise
                self.refused, turn = self.refused + 1, turn + 1

    def _read(self, front: Client, ask: dict[str, Any], heard: list[int]) -> None:
        last = time.monotonic()
        for response in front.generate(**{"ignore_eos": True, **ask}):
            now = time.monotonic()
            if heard:
                self.longest_pause_seconds = max(self.longest_pause_seconds, now - last)
            last = now
            heard += response.chunk.token_ids

    def during(self, work: Callable[[], None]) -> int:
        """How many were answered, each exactly, while `work` was done."""
        with ThreadPoolExecutor(CLIENTS) as threads:
            running = [threads.submit(self.run, number) for number in range(CLIENTS)]
            try:
                work()
            finally:
                self._over.set()
            return sum(each.result(WAIT_SECONDS) for each in running)


def ids(status: GetStatusResponse) -> list[str]:
    return sorted(worker.info.id for worker in status.workers)


def test_every_worker_is_restarted_under_load_and_no_answer_changes(four: Cluster) -> None:
    before = {worker.info.id: worker.info.epoch for worker in four.client.status().workers}
    load, moved = Load(four), 0

    def restart_all() -> None:
        nonlocal moved
        for worker in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            moved += four.client.drain(worker, replace=True).moved

    answered = load.during(restart_all)
    after = {worker.info.id: worker.info.epoch for worker in four.client.status().workers}
    print(f"\n{answered} answers, {moved} of them moved, longest pause {load.longest_pause_seconds:.2f} s")
    assert after == {worker: epoch + 1 for worker, epoch in before.items()}
    assert answered >= CLIENTS
    assert moved > 0
    four.at_rest()


def test_fronts_and_the_scheduler_are_replaced_under_load_and_no_answer_changes(four: Cluster, second: Client) -> None:
    before, load = pids(four), Load(four, second)

    def restart_all() -> None:
        second.drain("front-0", replace=True)
        second.drain("scheduler", replace=True)
        four.client.drain("front-1", replace=True)

    answered = load.during(restart_all)
    print(f"\n{answered} answers, {load.refused} refusals, longest pause {load.longest_pause_seconds:.2f} s")
    assert answered >= CLIENTS
    # Who was replaced ends when its last answer is over.
    four.until(lambda _: len(pids(four)) == len(before), "the old ones have ended")
    assert not before & pids(four)
    assert ids(four.client.status()) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    four.at_rest()


def pids(cluster: Cluster) -> set[int]:
    """Of fronts and schedulers."""
    words = {process.pid: process.cmdline()[0] for process in cluster.processes()}
    return {pid for pid, word in words.items() if "FrontActor" in word or "SchedulerActor" in word}


def test_pools_grow_and_shrink_and_roles_change_under_load(four: Cluster) -> None:
    load = Load(four)

    def operate() -> None:
        assert list(four.client.scale("decode", 3).started) == ["decode-2"]
        four.client.set_role("decode-2", "prefill")
        assert list(four.client.scale("prefill", 4).started) == ["prefill-2"]
        four.client.set_role("decode-2", "decode")
        assert list(four.client.scale("prefill", 2).ended) == ["prefill-2"]
        assert list(four.client.scale("decode", 2).ended) == ["decode-2"]

    assert load.during(operate) >= CLIENTS
    assert ids(four.client.status()) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    four.at_rest()


def test_the_last_that_decodes_can_not_go_and_a_stranger_is_not_known(four: Cluster) -> None:
    client = four.client
    with pytest.raises(InvalidRequest, match="nobody would decode: start another worker first"):
        client.scale("decode", 0)
    with pytest.raises(InvalidRequest, match="no worker 'decode-9' here, but"):
        client.drain("decode-9")
    with pytest.raises(InvalidRequest, match="scheduler can't be done without"):
        client.drain("scheduler")
    with pytest.raises(InvalidRequest, match="no worker 'nobody' here"):
        client.set_role("nobody", "mixed")
    node = client.status().workers[0].info.node
    with pytest.raises(InvalidRequest, match="is the only node of this Ray: add another first"):
        client.drain_node(node)
    with pytest.raises(InvalidRequest, match="no node 'no such node' in this Ray, but "):
        client.drain_node("no such node")
    assert ids(client.status()) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]


def test_the_commands_say_what_they_did(four: Cluster) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "cluster", *arguments, "--grpc", four.grpc]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        return f"{done.returncode} {done.stdout}{done.stderr}"

    assert run("role", "prefill-1", "mixed").startswith("0 prefill-1 is a mixed worker now")
    assert run("role", "prefill-1", "prefill").startswith("0 prefill-1 is a prefill worker now")
    assert run("scale", "decode", "2").startswith("0 decode has 2: nothing to do")
    assert run("drain", "front-0", "--replace").startswith("0 front-0 has a successor, ")
    assert run("drain", "decode-1").startswith("0 decode-1 has ended: ")
    assert "no node '10.9.9.9' in this Ray" in run("drain", "--node", "10.9.9.9")
    assert run("drain").startswith("2 ")
    assert run("drain", "decode-0", "--node", "10.9.9.9").startswith("2 ")
    assert run("drain", "--replace", "--node", "10.9.9.9").startswith("2 ")
    assert run("drain", "decode-0").startswith("1 diptych: without decode-0 nobody would decode")
    assert run("scale", "decode", "2").startswith("0 decode has 2: started decode-1")
