"""Real clusters: `diptych serve` in processes of its own, reached the way users reach it, and its end looked at."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import pytest

from diptych import Client

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from diptych.types import ModelSource
    from diptych.v1.admin_pb2 import GetStatusResponse, WorkerStatus
    from diptych.v1.inference_pb2 import GenerateComplete, GenerateResponse, Served

TREE = Path(__file__).resolve().parents[2]
MARK = "E2E_CLUSTER"
"""Inherited by every process that a cluster starts, so that none can hide."""
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
START_SECONDS = 120
END_SECONDS = 30
WAIT_SECONDS = 180
STATUS_CACHE_SECONDS = 0.5


@dataclass(frozen=True)
class Answer:
    """What one request brought."""

    text: str
    tokens: tuple[int, ...]
    fingerprints: tuple[bytes, ...]
    argmax: tuple[int, ...]
    complete: GenerateComplete

    @property
    def served(self) -> Served:
        return self.complete.diptych


def whole(responses: Iterator[GenerateResponse]) -> Answer:
    """All of a stream, which must end with `complete`."""
    *events, last = responses
    chunks = [event.chunk for event in events]
    return Answer(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.token_ids),
        fingerprints=tuple(each for chunk in chunks for each in chunk.fingerprints),
        argmax=tuple(token for chunk in chunks for token in chunk.argmax_token_ids),
        complete=last.complete,
    )


@dataclass
class Cluster:
    """One running `diptych serve`."""

    process: subprocess.Popen[str]
    mark: str
    log: Path
    http: str
    """Host and port."""
    grpc: str
    started_seconds: float
    """Until it said so."""
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = Client(self.grpc, timeout_seconds=WAIT_SECONDS)

    # ---- requests ---------------------------------------------------------------------------------

    def answer(self, **ask: Any) -> Answer:
        """One greedy answer over gRPC."""
        return whole(self.client.generate(**{"temperature": 0, "ignore_eos": True, **ask}))

    def answers(self, asks: Sequence[dict[str, Any]]) -> list[Answer]:
        """All at the same time."""
        self.client.status()
        with ThreadPoolExecutor(len(asks)) as threads:
            return list(threads.map(lambda ask: self.answer(**ask), asks))

    # ---- what it says of itself -------------------------------------------------------------------

    def until(self, true: Callable[[GetStatusResponse], bool], what: str) -> GetStatusResponse:
        """The first status for which it is true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not true(status := self.client.status()):
            assert time.monotonic() < deadline, f"waited {WAIT_SECONDS} s until {what}:\n{status}\n{self.tail()}"
            threading.Event().wait(0.05)
        return status

    def at_rest(self) -> dict[str, WorkerStatus]:
        """The workers, by id, once all requests are over everywhere, from reports made since the call."""
        began = time.monotonic()

        def rests(status: GetStatusResponse) -> bool:
            fresh = time.monotonic() - began - STATUS_CACHE_SECONDS
            return all(worker.report_age_seconds < fresh and is_idle(worker) for worker in status.workers)

        workers = {worker.info.id: worker for worker in self.until(rests, "every worker rests").workers}
        for worker in workers.values():
            check_at_rest(worker)
        return workers

    def tail(self) -> str:
        """What it and its workers said last."""
        logs = [self.log, *(log for folder in self.folders() for log in sorted(folder.glob("logs/worker-*.err")))]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs)

    # ---- processes ----------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Everything that it started, directly or not, and that still runs."""
        return marked(self.mark)

    def folders(self) -> list[Path]:
        """Ray's folders, as its processes were told."""
        arguments = (part for process in self.processes() for part in process.cmdline())
        found = (re.fullmatch(r"--(?:temp|session)[-_]dir=(.+)", argument) for argument in arguments)
        return sorted({Path(match[1]) for match in found if match})

    def end(self, ask_to_end: Callable[[subprocess.Popen[str]], None] = subprocess.Popen.terminate) -> None:
        """Ask it to end, once, and look at what is left."""
        folders = self.folders()
        assert folders, "its Ray has a folder"
        ask_to_end(self.process)
        status = self.process.wait(END_SECONDS)
        left = [f"{process.pid} {process.cmdline()[:4]}" for process in self.processes()]
        assert (status, left) == (0, []), self.tail()
        assert [folder for folder in folders if folder.exists()] == []
        assert not self.is_listening()

    def is_listening(self) -> bool:
        """At either address."""
        return any(accepts(address) for address in (self.http, self.grpc))


def is_idle(worker: WorkerStatus) -> bool:
    load = worker.load
    return not (
        load.running_requests or load.waiting_requests or load.blocks_held or load.blocks_granted or load.blocks_lent
    )


def check_at_rest(worker: WorkerStatus) -> None:
    """Every block is free or cached, and none is anybody's whom nobody knows."""
    load, total = worker.load, worker.info.blocks
    assert load.blocks_free + load.blocks_cached == total, f"{worker.info.id} has {total} blocks: {load}"
    assert worker.counters.leaked_blocks == 0, f"{worker.info.id} leaked blocks"


def has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False  # gone meanwhile, or the kernel's


def marked(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if has_mark(process, mark)]


def kill_all(mark: str) -> None:
    for process in marked(mark):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


# ---- starting ---------------------------------------------------------------------------------------


def end_with_us() -> None:
    """In the child: it is asked to end when the tests are killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def environment(mark: str) -> dict[str, str]:
    """Ours without what would configure a cluster or join another Ray."""
    kept = {name: value for name, value in os.environ.items() if "__" not in name and not name.startswith("RAY_")}
    return {**kept, MARK: mark}


def start(log: Path, *arguments: str) -> Cluster:
    """Until it has printed its addresses."""
    mark, began = uuid.uuid4().hex, time.monotonic()
    command = [sys.executable, "-m", "cluster", "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", *arguments]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=TREE,
            env=environment(mark),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_us,
        )
    watchdog = threading.Timer(START_SECONDS, kill_all, [mark])
    watchdog.start()
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(2)]
    watchdog.cancel()
    addresses = [re.search(r"127\.0\.0\.1:\d+", line) for line in said]
    if not all(addresses):
        kill_all(mark)
        process.wait(END_SECONDS)
        process.stdout.close()
        raise AssertionError(f"{command} did not start:\n{log.read_text()[-4000:]}")
    http, grpc = (address[0] for address in addresses if address)
    return Cluster(process, mark, log, http, grpc, time.monotonic() - began)


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[Cluster]:
    """A cluster that must end well, whatever happened to it meanwhile."""
    cluster = start(log, *arguments)
    try:
        yield cluster
        if cluster.process.poll() is None:
            cluster.end()
    finally:
        kill_all(cluster.mark)  # only when `end` failed or was never reached
        cluster.process.wait(END_SECONDS)
        cluster.client.close()
        assert cluster.process.stdout is not None
        cluster.process.stdout.close()


class Start(Protocol):
    """The fixture `cluster`."""

    def __call__(self, *arguments: str) -> AbstractContextManager[Cluster]: ...


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, default_model: ModelSource) -> Start:
    """`with cluster("--model", …) as it:` a `diptych serve` with these arguments, on free ports."""

    def started(*arguments: str) -> AbstractContextManager[Cluster]:
        return running(tmp_path_factory.mktemp("cluster") / "log", *arguments)

    return started


def settings(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.fixture(scope="session")
def served(cluster: Start) -> Iterator[Cluster]:
    """The default model as users get it, prefill and decode apart."""
    with cluster(*settings("placement.how=remote")) as running:
        yield running


@pytest.fixture(scope="session")
def exact(cluster: Start) -> Iterator[Cluster]:
    """The default model in fp32, prefill and decode apart, prompts in chunks of 32 tokens, room for 96 blocks."""
    numbers = ("model.dtype=fp32", "engine.max_batch_tokens=32", "engine.threads=1")
    # A patient lease: what is tested here is never a slow machine.
    room = ("kv.memory=68MiB", "kv.lease_seconds=60")
    with cluster(*settings("placement.how=remote", *numbers, *room)) as running:
        yield running


@pytest.fixture(scope="session")
def tiny(cluster: Start) -> Iterator[Cluster]:
    """A model of a thousandth of the size, fp32, prefill and decode apart, sixteen sequences at a time."""
    model = ("--model", "random:tiny", *settings("model.dtype=fp32", "engine.threads=1"))
    with cluster(*model, *settings("placement.how=remote", "engine.max_running=16", "kv.memory=64MiB")) as running:
        yield running
