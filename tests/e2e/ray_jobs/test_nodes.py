"""`ray job submit` to a Ray of four nodes with role labels: who runs where, a lost node, a node in its place."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from diptych import Client

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.ray_jobs.conftest import Head, Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]

ADDRESSES = {"front": "127.0.0.3", "prefill": "127.0.0.4", "decode": "127.0.0.5"}
LABELLED = ("--set", "pools.prefill.labels=role=prefill", "--set", "pools.decode.labels=role=decode")
NUMBERS = ("--set", "model.dtype=fp32", "--set", "kv.link=gloo", "--set", "placement.how=remote")
PROMPT = list(range(60))
TOKENS = 1500
LOST_SECONDS = 180
GONE_SECONDS = 20
STARTED = "Ray runtime started"
Until = Callable[..., Any]


class Node:
    """One `ray start` beside the head's, on a loopback address of its own."""

    def __init__(self, head: Head, role: str, ports: list[int]) -> None:
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        chosen = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        where = (f"--address={head.address}", f"--node-ip-address={ADDRESSES[role]}", f"--labels=role={role}")
        size = ("--num-cpus=1", "--object-store-memory=100000000", f'--resources={{"{role}": 1}}')
        with (head.folder / f"{role}.log").open("w") as log:
            self.process = subprocess.Popen(
                [*head.ray, "start", "--block", *where, *chosen, *size],
                cwd=head.folder,
                env=head.environment() | {"RAY_JOBS_TEST": head.mark},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """All of the machine, at once."""
        of_it = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in of_it:
            process.kill()
        self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            of_it = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            _, left = psutil.wait_procs([*of_it, psutil.Process(self.process.pid)], timeout=15)
            for process in left:
                process.kill()
            self.process.wait(15)


class Nodes:
    """By role."""

    def __init__(self, head: Head, ports: Iterator[int], wait_until: Until) -> None:
        self._head = head
        self._ports = ports
        self._wait_until = wait_until
        self._stack = ExitStack()
        self.of: dict[str, Node] = {}

    def add(self, role: str) -> None:
        """One at a time: nodes of one machine choose the names of their sockets by what is there already."""
        self.of[role] = Node(self._head, role, [next(self._ports) for _ in range(3)])
        self._stack.callback(self.of[role].close)
        log = self._head.folder / f"{role}.log"
        self._wait_until(lambda: STARTED in log.read_text(), f"the {role} node is there", told=log.read_text)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def nodes_of(head: Head, ports: Iterator[int], wait_until: Until) -> Iterator[Nodes]:
    nodes = Nodes(head, ports, wait_until)
    try:
        for role in ADDRESSES:
            nodes.add(role)
        yield nodes
    finally:
        nodes.close()


def stream(served: Served, begun: threading.Event) -> list[int]:
    told: list[int] = []
    with Client(served.grpc, timeout_seconds=LOST_SECONDS) as client:
        for event in client.generate(tokens=PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True):
            told.extend(event.chunk.token_ids)
            begun.set()
    return told


def workers(served: Served) -> dict[str, tuple[str, int]]:
    """The addresses and epochs of those that are alive."""
    with Client(served.grpc, timeout_seconds=10) as client:
        alive = [worker.info for worker in client.status().workers if worker.alive]
    return {info.id: (info.host, info.epoch) for info in alive}


def alive(head: Head) -> int:
    nodes = head.get("/api/v0/nodes?limit=100")["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" for node in nodes)


def is_ready(served: Served) -> bool:
    with Client(served.grpc, timeout_seconds=10) as client:
        return client.status().ready


@pytest.fixture
def installed(head: Head, wheel: Path) -> Iterator[None]:
    """Not a working directory: nodes of one machine share Ray's folder, and each sweeps what the others use."""
    head.venv.install(wheel)
    yield
    head.venv.uninstall()


@pytest.mark.usefixtures("installed")
def test_a_job_on_four_nodes(head: Head, unused_ports: Iterator[int], wait_until: Until) -> None:
    with nodes_of(head, unused_ports, wait_until) as nodes:
        wait_until(lambda: alive(head) == 4, "four nodes are there")
        on_front = ("--entrypoint-resources", '{"front": 0.01}')
        head.submit("nodes", *on_front, command=["diptych"], more=(*LABELLED, *NUMBERS))
        [served] = head.until_job_serves("nodes")
        served.check_answers()
        assert workers(served) == {f"{role}-0": (ADDRESSES[role], 0) for role in ("prefill", "decode")}
        whole = stream(served, threading.Event())

        with ThreadPoolExecutor(1) as threads:
            begun = threading.Event()
            answer = threads.submit(stream, served, begun)
            assert begun.wait(LOST_SECONDS)
            nodes.of["decode"].kill()
            killed = time.monotonic()
            wait_until(lambda: not is_ready(served), "nobody can answer")
            print(f"not ready {time.monotonic() - killed:.1f} s after the node's death")
            nodes.add("decode")
            wait_until(lambda: is_ready(served), "somebody can answer")
            assert answer.result(LOST_SECONDS) == whole, "it went on where it was, in fp32 with the very tokens"
        print(f"ready {time.monotonic() - killed:.1f} s after the node's death, with another in its place")
        host, epoch = workers(served)["decode-0"]  # Ray may have tried the dead node first
        assert (host, epoch > 0) == (ADDRESSES["decode"], True)
        assert stream(served, threading.Event()) == whole

        head.job("stop", "nodes")
        head.until_gone(GONE_SECONDS)
        assert not served.listens
