"""How large the processes of a cluster are that live as long as it. Knows no request."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.e2e.conftest import Cluster


@dataclass
class Memory:
    """Of processes that live as long as the cluster, in bytes, by process."""

    names: dict[int, str]
    seen: list[dict[int, int]] = field(default_factory=list[dict[int, int]])

    def look(self) -> None:
        self.seen.append({pid: psutil.Process(pid).memory_info().rss for pid in self.names})

    def quarter(self, number: int, pid: int) -> float:
        """The median of it; numbers count from 1."""
        size = len(self.seen) / 4
        part = self.seen[int((number - 1) * size) : int(number * size)]
        return statistics.median(look[pid] for look in part)

    def table(self) -> list[tuple[str, float, float]]:
        """Name, MiB in the second and in the last quarter."""
        return [(name, self.quarter(2, pid) / 2**20, self.quarter(4, pid) / 2**20) for pid, name in self.names.items()]


def long_lived(cluster: Cluster) -> dict[int, str]:
    """All processes but workers and the front that may be killed."""
    found: dict[int, str] = {}
    for process in cluster.processes():
        words = process.cmdline()
        if "WorkerActor" not in words[0] and not words[0].startswith("ray::IDLE"):
            ours = "diptych serve" if "serve" in words else process.name()
            found[process.pid] = words[0].partition(".")[0] if words[0].startswith("ray::") else ours
    return found


def listens(process: psutil.Process, port: int) -> bool:
    return any(each.status == "LISTEN" and each.laddr.port == port for each in process.net_connections("tcp"))
