"""A front, the scheduler or a worker dies under load: who had nothing to do with it notices nothing."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from diptych import Client
from diptych.client import Unreachable
from diptych.errors import ServingError

if TYPE_CHECKING:
    from tests.e2e.conftest import Cluster, Start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TOKENS = 1200
STREAMS = (0, 1)
WAIT_SECONDS = 60
KILLED_SECONDS = 10
SETTINGS = ("model.dtype=fp32", "placement.how=remote", "kv.lease_seconds=5", "kv.memory=64MiB", "engine.threads=1")
ARGUMENTS = ("--model", "random:tiny", *(part for pair in SETTINGS for part in ("--set", pair)))


def until(true: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """The first value that is true."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        threading.Event().wait(0.1)
    return value


class Stream:
    """One long greedy answer under way; `begun` when its first token is here."""

    def __init__(self, target: str, number: int) -> None:
        self._target = target
        self._prompt = list(range(20 * number, 20 * number + 60))
        self._begun = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._tokens: Future[list[int]] = self._pool.submit(self._run)
        self._pool.shutdown(wait=False)

    def _run(self) -> list[int]:
        tokens: list[int] = []
        with Client(self._target, timeout_seconds=WAIT_SECONDS) as client:
            asked = client.generate(tokens=self._prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            for response in asked:
                tokens.extend(response.chunk.token_ids)
                self._begun.set()
        return tokens

    def wait_begun(self) -> Stream:
        assert self._begun.wait(WAIT_SECONDS), self._tokens.exception(0)
        return self

    def tokens(self) -> list[int]:
        return self._tokens.result(WAIT_SECONDS)

    def error(self) -> BaseException | None:
        return self._tokens.exception(WAIT_SECONDS)


class Fronts:
    """A cluster with two of them, and what it answers when nothing happens."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        assert cluster.process.stdout is not None
        said = [cluster.process.stdout.readline() for _ in range(2)]
        http, grpc = (re.search(r"127\.0\.0\.1:\d+", line) for line in said)
        assert http
        assert grpc
        self.grpc = (cluster.grpc, grpc[0])
        self.undisturbed = [Stream(self.grpc[0], number).tokens() for number in STREAMS]

    def streams(self, front: int) -> list[Stream]:
        begun = [Stream(self.grpc[front], number) for number in STREAMS]
        return [stream.wait_begun() for stream in begun]

    def process(self, actor: str, address: str | None = None) -> psutil.Process:
        """Of the actor class; the one that listens there."""
        port = address and int(address.rpartition(":")[2])
        [found] = [
            process
            for process in self.cluster.processes()
            if process.name().startswith(f"ray::{actor}"[:15])
            and (port is None or port in {used.laddr.port for used in process.net_connections()})
        ]
        return found

    def epochs(self) -> dict[str, int]:
        """Of the workers that are up."""
        return {worker.info.id: worker.info.epoch for worker in self.cluster.client.status().workers}

    def check_whole(self) -> None:
        """Both fronts answer like on the first day, and no block is anybody's."""

        def answers(target: str) -> bool:
            with suppress(ServingError, Unreachable), Client(target, timeout_seconds=WAIT_SECONDS) as client:
                return client.status().ready
            return False

        for front, target in enumerate(self.grpc):
            until(lambda target=target: answers(target), f"{target} answers")
            assert [stream.tokens() for stream in self.streams(front)] == self.undisturbed
        self.cluster.at_rest()


@pytest.fixture(scope="module")
def fronts(cluster: Start) -> Iterator[Fronts]:
    with cluster(*ARGUMENTS, "--fronts", "2") as running:
        yield Fronts(running)


def test_a_killed_front_cuts_off_its_own_clients_only_and_comes_back_on_its_ports(fronts: Fronts) -> None:
    victim = fronts.process("FrontActor", fronts.grpc[0])
    its, others = fronts.streams(0), fronts.streams(1)
    victim.kill()
    assert all(isinstance(stream.error(), Unreachable) for stream in its)
    assert [stream.tokens() for stream in others] == fronts.undisturbed
    fronts.check_whole()
    assert all(worker.counters.requests_cancelled >= len(STREAMS) for worker in decoding(fronts.cluster))


def test_running_requests_do_not_notice_that_the_scheduler_died(fronts: Fronts) -> None:
    indexed = fronts.cluster.client.status().index_blocks
    victim = fronts.process("SchedulerActor")
    streams = fronts.streams(0)
    victim.kill()
    late = fronts.streams(1)  # placed by its successor
    assert [stream.tokens() for stream in streams] == fronts.undisturbed
    assert [stream.tokens() for stream in late] == fronts.undisturbed
    fronts.check_whole()
    status = fronts.cluster.until(lambda status: status.index_blocks >= indexed, "all blocks are indexed again")
    assert {worker.info.id for worker in status.workers} == {"prefill-0", "decode-0"}


@pytest.mark.full
def test_a_worker_that_is_stuck_is_killed_and_replaced(fronts: Fronts) -> None:
    before = fronts.epochs()
    [decode] = decoding(fronts.cluster)
    stopped = psutil.Process(decode.info.pid)
    stopped.send_signal(signal.SIGSTOP)
    wanted = before | {"decode-0": before["decode-0"] + 1}
    until(lambda: fronts.epochs() == wanted, "its successor is up")
    until(lambda: not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE, "it is gone")
    fronts.check_whole()
    assert "decode-0 did not answer for 5 s and was killed" in fronts.cluster.log.read_text()


@pytest.mark.full
def test_two_clusters_on_a_machine_do_not_touch_each_other(fronts: Fronts, cluster: Start) -> None:
    with cluster(*ARGUMENTS) as other:
        streams = fronts.streams(0)
        assert Stream(other.grpc, 0).tokens() == fronts.undisturbed[0]
        folders = fronts.cluster.folders()
        assert not set(folders) & set(other.folders())
        other.process.kill()
        until(lambda: not other.processes(), "everything of the killed one is gone", KILLED_SECONDS)
        assert [stream.tokens() for stream in streams] == fronts.undisturbed
    assert all(folder.exists() for folder in folders)
    fronts.check_whole()


def test_an_address_in_use_is_refused_before_anything_is_started(fronts: Fronts, cluster: Start) -> None:
    refusal = rf"can't listen on {fronts.grpc[1]}: .*; choose another --grpc HOST:PORT"
    with pytest.raises(AssertionError, match=refusal), cluster(*ARGUMENTS, "--grpc", fronts.grpc[1]):
        pytest.fail("it started")
    fronts.check_whole()


def decoding(cluster: Cluster) -> list[Any]:
    return [worker for worker in cluster.client.status().workers if worker.info.id == "decode-0"]
