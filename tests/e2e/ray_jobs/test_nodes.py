"""`ray job submit` to a Ray of nodes with role labels: who runs where; nodes lost, replaced, added, taken away."""

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
from diptych.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.ray_jobs.conftest import Head, Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(900)]

ADDRESSES = {
    "front": "127.0.0.3",
    "prefill": "127.0.0.4",
    "decode": "127.0.0.5",
    "decode-2": "127.0.0.6",
    "decode-3": "127.0.0.7",
    "prefill-2": "127.0.0.8",
}
FIRST = ("front", "prefill", "decode")
LABELLED = ("--set", "pools.prefill.labels=role=prefill", "--set", "pools.decode.labels=role=decode")
NUMBERS = ("--set", "model.dtype=fp32", "--set", "kv.link=gloo", "--set", "placement.how=remote")
PROMPT = list(range(60))
TOKENS = 1500
LOST_SECONDS = 180
GONE_SECONDS = 20
STARTED = "Ray runtime started"
Until = Callable[..., Any]


class Node:
    """One `ray start` beside the head's, on a loopback address of its own. `name` begins with its role."""

    def __init__(self, head: Head, name: str, ports: list[int]) -> None:
        role = name.partition("-")[0]
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        chosen = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        where = (f"--address={head.address}", f"--node-ip-address={ADDRESSES[name]}", f"--labels=role={role}")
        size = ("--num-cpus=1", "--object-store-memory=100000000", f'--resources={{"{role}": 1}}')
        with (head.folder / f"{name}.log").open("w") as log:
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
    """By name."""

    def __init__(self, head: Head, ports: Iterator[int], wait_until: Until) -> None:
        self._head = head
        self._ports = ports
        self._wait_until = wait_until
        self._stack = ExitStack()
        self.of: dict[str, Node] = {}

    def add(self, name: str) -> None:
        """One at a time: nodes of one machine choose the names of their sockets by what is there already."""
        self.of[name] = Node(self._head, name, [next(self._ports) for _ in range(3)])
        self._stack.callback(self.of[name].close)
        log = self._head.folder / f"{name}.log"
        self._wait_until(lambda: STARTED in log.read_text(), f"the {name} node is there", told=log.read_text)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def nodes_of(head: Head, ports: Iterator[int], wait_until: Until) -> Iterator[Nodes]:
    nodes = Nodes(head, ports, wait_until)
    try:
        for name in FIRST:
            nodes.add(name)
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


@pytest.mark.usefixtures("installed")
def test_pools_take_the_nodes_that_come_and_leave_those_that_go(
    head: Head, unused_ports: Iterator[int], wait_until: Until
) -> None:
    """Added, lost, drained: no answer changes, and where somebody can't be done without, a stand-in comes first."""
    grows = ("--set", "pools.decode.max_workers=2", "--set", "cluster.drain_seconds=8")
    with nodes_of(head, unused_ports, wait_until) as nodes:
        wait_until(lambda: alive(head) == 4, "four nodes are there")
        on_front = ("--entrypoint-resources", '{"front": 0.01}')
        head.submit("grows", *on_front, command=["diptych"], more=(*LABELLED, *NUMBERS, *grows))
        [served] = head.until_job_serves("grows")
        whole = stream(served, threading.Event())

        def until_decoding(*names: str) -> None:
            wanted = sorted(ADDRESSES[name] for name in names)
            wait_until(lambda: decoding(served) == wanted, f"{names} decode", told=lambda: str(workers(served)))

        nodes.add("decode-2")
        until_decoding("decode", "decode-2")
        before = workers(served)["decode-1"]
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(stream, served, threading.Event()) for _ in range(2)]
            wait_until(lambda: running(served) == 2, "both answers have begun")
            nodes.of["decode-2"].kill()
            until_decoding("decode")
            assert is_ready(served)
            assert [answer.result(LOST_SECONDS) for answer in answers] == [whole, whole]
        nodes.add("decode-2")
        until_decoding("decode", "decode-2")
        assert workers(served)["decode-1"] > before, "another life of the name"

        with ThreadPoolExecutor(2) as threads, Client(served.grpc, timeout_seconds=LOST_SECONDS) as client:
            answers = [threads.submit(stream, served, threading.Event()) for _ in range(2)]
            wait_until(lambda: running(served) == 2, "both answers have begun")
            done = client.drain_node(ADDRESSES["decode"])
            assert list(done.ended) == ["decode-0"]
            print(f"{done.moved} answers moved in {done.seconds:.1f} s")
            assert [answer.result(LOST_SECONDS) for answer in answers] == [whole, whole]
        nodes.add("decode-3")
        until_decoding("decode-2", "decode-3")  # and not where the first has room

        drain_who_is_needed(served, nodes, wait_until)
        assert stream(served, threading.Event()) == whole
        head.job("stop", "grows")
        head.until_gone(GONE_SECONDS)


def drain_who_is_needed(served: Served, nodes: Nodes, wait_until: Until) -> None:
    """The only prefill worker, where placement.how = remote needs one; and nodes with nothing on them."""
    with Client(served.grpc, timeout_seconds=LOST_SECONDS) as client:
        with pytest.raises(InvalidRequest, match=r"no node '10\.9\.9\.9' in this Ray, but"):
            client.drain_node("10.9.9.9")
        assert list(client.drain_node(ADDRESSES["front"]).ended) == []
        with pytest.raises(InvalidRequest, match=r"without prefill-0 placement\.how = 'remote' would lack"):
            client.drain_node(ADDRESSES["prefill"])
        assert is_ready(served)
        assert "prefill-1" not in workers(served), "what was refused has changed nothing"

        def drained() -> bool:
            try:
                return list(client.drain_node(ADDRESSES["prefill"]).ended) == ["prefill-0"]
            except InvalidRequest:  # its successor was not up in time
                return False

        nodes.add("prefill-2")
        wait_until(drained, "it is drained, with another in its place")
        assert workers(served)["prefill-1"][0] == ADDRESSES["prefill-2"]


def decoding(served: Served) -> list[str]:
    return sorted(host for who, (host, _) in workers(served).items() if who.startswith("decode"))


def running(served: Served) -> int:
    with Client(served.grpc, timeout_seconds=10) as client:
        return sum(worker.load.running_requests for worker in client.status().workers if "decode" in worker.info.id)
