"""A Ray of several machines on this one: each node has a network namespace, and an address on one bridge.

Two nodes are parted by a false hardware address of the other in each one's table of neighbours: what they send leaves,
reaches nobody, and nobody is told. A node is cut off from all by its cable. Needs root and iproute2.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from tests.e2e.conftest import END_SECONDS, TREE, end_with_us, environment, kill_all, marked
from tests.k8s.pod_network import Network, run

WAIT_SECONDS = 120
PORT = 6379
NOBODY = "02:00:00:00:00:fe"
HEALTH = {"initial_delay_ms": "2000", "period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3"}
"""As in k8s/base."""


def until(true: Callable[[], bool], told: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


class Lan:
    """The head is a node without workers. Nodes start one at a time: they choose names by what is there."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._network = Network()
        self._folder = tempfile.TemporaryDirectory(prefix="lan-", ignore_cleanup_errors=True)
        self._token = secrets.token_hex(32)
        self._names: dict[str, str] = {}
        self.addresses: dict[str, str] = {}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._network.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for process in marked(self.mark):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(marked(self.mark), END_SECONDS)
        kill_all(self.mark)
        for node in self._nodes.values():
            node.wait(END_SECONDS)
        for name in self._names.values():
            self._network.remove(name)
        self._network.__exit__(*error)
        self._folder.cleanup()

    # ---- processes ------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        ray = {f"RAY_health_check_{name}": value for name, value in HEALTH.items()}
        auth = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_ADDRESS": f"{self.addresses['head']}:{PORT}",
        }
        return {**environment(self.mark), **ray, **auth, "PYTHONPATH": f"{TREE}{os.pathsep}{TREE / 'proto'}"}

    def start(self, node: str, role: str = "") -> None:
        """Returns when it is a part of the Ray."""
        if node not in self._names:
            self._names[node] = f"n{uuid.uuid4().hex[:8]}"
            self.addresses[node] = self._network.add(self._names[node])
        address = self.addresses[node]
        head = ["--head", f"--port={PORT}", f"--temp-dir={self._folder.name}", "--include-dashboard=false"]
        where = [f"--address={self.addresses['head']}:{PORT}", f"--labels=role={role}"] if role else head
        size = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats")
        log = Path(self._folder.name) / f"{node}.log"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
        with log.open("w") as output:
            self._nodes[node] = self.popen(node, [*ray, *where, *size], stdout=output, stderr=output)
        until(lambda: "Ray runtime started" in log.read_text(), lambda: f"{node} did not start:\n{log.read_text()}")

    def popen(self, node: str, command: list[str], **how: Any) -> subprocess.Popen[Any]:
        inside = ["ip", "netns", "exec", self._names[node], *command]
        return subprocess.Popen(
            inside, cwd=TREE, env=self.environment(), start_new_session=True, preexec_fn=end_with_us, **how
        )

    def wait_ended(self, node: str) -> None:
        """Of one that was cut off: its raylet ends itself when it hears that it was given up."""
        self._nodes[node].wait(WAIT_SECONDS)

    # ---- the network ----------------------------------------------------------------------------------

    def sever(self, node: str, others: str) -> None:
        """From another node, or from everybody. Both sides of a pair go on hearing everybody else."""
        if others == "everybody":
            self._network.cut(self._names[node])
            return
        for here, there in ((node, others), (others, node)):
            neighbour = ("neighbour", "replace", self.addresses[there], "lladdr", NOBODY)
            run("ip", "-netns", self._names[here], *neighbour, "dev", "eth0", "nud", "permanent")

    def mend(self, node: str, others: str) -> None:
        if others == "everybody":
            self._network.heal(self._names[node])
            return
        for here, there in ((node, others), (others, node)):
            run("ip", "-netns", self._names[here], "neighbour", "delete", self.addresses[there], "dev", "eth0")
