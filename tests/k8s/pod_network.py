"""Network namespaces on one bridge: an address for each pod. Knows no pod."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path
from typing import Self

SUBNET = "198.18.77"
"""Of the range for benchmarks (RFC 2544): nobody routes it."""


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=30)


class Network:
    """One bridge; every pod has an address on it, and so has this process."""

    def __init__(self) -> None:
        self.bridge = f"pods{uuid.uuid4().hex[:8]}"
        self._last = 1

    def __enter__(self) -> Self:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{SUBNET}.1/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        run("ip", "link", "delete", self.bridge)

    def add(self, namespace: str) -> str:
        """Its address."""
        self._last += 1
        address = f"{SUBNET}.{self._last}"
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", self.cable(namespace), "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "link", "set", self.cable(namespace), "master", self.bridge, "up")
        inside = ("ip", "-netns", namespace)
        run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        return address

    def cable(self, namespace: str) -> str:
        return f"v{namespace}"[:15]

    def cut(self, namespace: str) -> None:
        """Nothing passes, and neither side is told."""
        run("ip", "link", "set", self.cable(namespace), "down")

    def heal(self, namespace: str) -> None:
        run("ip", "link", "set", self.cable(namespace), "up")

    def remove(self, namespace: str) -> None:
        run("ip", "netns", "delete", namespace)
