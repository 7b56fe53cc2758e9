"""However it is asked to end, nothing of a cluster is left: processes, ports, folders, shared memory."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Barrier
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from diptych.errors import ServingError

if TYPE_CHECKING:
    from tests.e2e.conftest import Cluster, Start

pytestmark = pytest.mark.e2e

STREAMS = 4
WAIT_SECONDS, END_SECONDS = 60, 20
TREE = Path(__file__).resolve().parents[2]
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
    with cluster("--model", "random:tiny") as running, ThreadPoolExecutor(2 * STREAMS) as threads:
        begun = Barrier(2 * STREAMS + 1)
        answers = [threads.submit(read, running, begun) for _ in range(STREAMS)]
        http_ends = [threads.submit(read_http, running, begun) for _ in range(STREAMS)]
        begun.wait(WAIT_SECONDS)
        running.end(ask_to_end)
        for answer in answers:
            assert isinstance(answer.exception(WAIT_SECONDS), ServingError | ConnectionError), answer
        for end in http_ends:
            assert "is stopping" in end.result(WAIT_SECONDS)["error"]["message"]
        assert "Traceback" not in running.log.read_text()
    assert set(SHARED_MEMORY.iterdir()) <= shared


@pytest.mark.full
@pytest.mark.parametrize("victim", ["keeper", "launcher"])
def test_it_leaves_nothing_when_it_is_killed(cluster: Start, victim: str) -> None:
    with cluster("--model", "random:tiny") as running:
        everyone = running.processes()
        [launcher] = [process for process in everyone if process.ppid() == running.process.pid]
        (running.process if victim == "keeper" else launcher).kill()
        running.process.wait(END_SECONDS)
        _, left = psutil.wait_procs(everyone, timeout=END_SECONDS)
        assert left == []
        assert not running.is_listening()


@pytest.mark.full
@pytest.mark.parametrize("ask_to_end", [control_c, terminate])
def test_it_ends_at_once_while_it_starts(ask_to_end: Callable[[Popen[str]], None]) -> None:
    addresses = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    command = [sys.executable, "-m", "cluster", "serve", "--model", "random:tiny", *addresses]
    with Popen(command, cwd=TREE, stderr=PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert any("starting prefill-0" in line for line in process.stderr)
        everyone = psutil.Process(process.pid).children(recursive=True)
        ask_to_end(process)
        assert process.wait(END_SECONDS) == 0
        assert "stopped while starting" in process.stderr.read()
    assert not [one for one in everyone if one.is_running()]


def read_http(cluster: Cluster, begun: Barrier) -> Any:
    """The last event of a stream, after whatever came of the answer."""
    body = {"model": "random:tiny", "prompt": "Once", "max_tokens": 7000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"http://{cluster.http}/v1/completions", json=body, timeout=WAIT_SECONDS) as response:
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        last = next(events)
        begun.wait(WAIT_SECONDS)
        for event in events:
            last = event if event != "[DONE]" else last
    return json.loads(last)


def read(cluster: Cluster, begun: Barrier) -> None:
    """An answer of thousands of tokens, as far as it comes."""
    stream = cluster.client.generate("Once upon a time", max_tokens=8000, ignore_eos=True)
    next(stream)
    begun.wait(WAIT_SECONDS)
    for _ in stream:
        pass
