"""However it is asked to end, nothing of a cluster is left: processes, ports, folders, shared memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING

import pytest

from diptych.errors import ServingError

if TYPE_CHECKING:
    from subprocess import Popen

    from tests.e2e.conftest import Cluster, Start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STREAMS = 4
WAIT_SECONDS = 60
SHARED_MEMORY = Path("/dev/shm")


def control_c(process: Popen[str]) -> None:
    """A terminal's: to everyone in the foreground."""
    os.killpg(process.pid, signal.SIGINT)


def terminate(process: Popen[str]) -> None:
    """A supervisor's: to the one it started."""
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("ask_to_end", [control_c, terminate])
def test_it_ends_with_nothing_left_while_it_answers(cluster: Start, ask_to_end: Callable[[Popen[str]], None]) -> None:
    shared = set(SHARED_MEMORY.iterdir())
    with cluster("--model", "random:tiny") as running, ThreadPoolExecutor(STREAMS) as threads:
        begun = Barrier(STREAMS + 1)
        answers = [threads.submit(read, running, begun) for _ in range(STREAMS)]
        begun.wait(WAIT_SECONDS)
        running.end(ask_to_end)
        for answer in answers:
            assert isinstance(answer.exception(WAIT_SECONDS), ServingError | ConnectionError), answer
    assert set(SHARED_MEMORY.iterdir()) <= shared


def read(cluster: Cluster, begun: Barrier) -> None:
    """An answer of thousands of tokens, as far as it comes."""
    stream = cluster.client.generate("Once upon a time", max_tokens=8000, ignore_eos=True)
    next(stream)
    begun.wait(WAIT_SECONDS)
    for _ in stream:
        pass
