"""A real `diptych serve` in processes of its own, for benchmarks. Knows its command line and what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from results import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

STOP_SECONDS = 60


@dataclass(frozen=True)
class Cluster:
    """Where it listens, and its outermost process."""

    http: str
    grpc: str
    pid: int


@contextmanager
def serving(*arguments: str) -> Iterator[Cluster]:
    """Up and answering; ended afterwards."""
    command = [sys.executable, "-m", "cluster", "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "proto")))}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = [server.stdout.readline(), server.stdout.readline()]
            http, grpc = (re.search(r"(\S+:\d+)(/v1)?$", line.strip()) for line in said)
            if not (http and grpc):
                raise SystemExit("the cluster did not start: see above")
            yield Cluster(http[1].removeprefix("http://"), grpc[1], server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(STOP_SECONDS)
