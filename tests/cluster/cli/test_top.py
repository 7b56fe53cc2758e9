"""`diptych top` and shell completion, as processes: on a real terminal (a pty), without one, and for programs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.cli.cluster_view import rates
from diptych.v1.admin_pb2 import WorkerCounters, WorkerInfo, WorkerStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.conftest import ScriptedService, Wire

ROOT = Path(__file__).parents[3]
WAIT_SECONDS = 30


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}", "TERM": "xterm-256color", **more}


def diptych(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(
        command, env=environment(**more), capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
    )


class Terminal:
    """A `diptych top` on a terminal of 24 lines and 80 columns."""

    def __init__(self, target: str) -> None:
        self.screen, self._inside = pty.openpty()
        self.shown = b""
        command = [sys.executable, "-m", "cluster", "top", "--grpc", target, "--every", "0.2"]
        self.process = subprocess.Popen(
            command,
            env=environment(LINES="24", COLUMNS="80"),
            stdin=self._inside,
            stdout=self._inside,
            stderr=self._inside,
            start_new_session=True,
        )
        os.close(self._inside)

    def wait_shown(self, words: bytes) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while words not in self.shown:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{words!r} was not shown, but {self.shown[-2000:]!r}"
            self.shown += os.read(self.screen, 65536)

    def end(self) -> int:
        """Its exit status; what it still writes is read away."""
        try:
            while os.read(self.screen, 65536):
                pass
        except OSError:  # the other end is closed
            pass
        return self.process.wait(WAIT_SECONDS)


@pytest.fixture
def terminal(wire: Wire) -> Iterator[Terminal]:
    terminal = Terminal(wire.target)
    yield terminal
    terminal.process.kill()
    terminal.process.wait(WAIT_SECONDS)
    os.close(terminal.screen)


def test_top_refreshes_until_q(terminal: Terminal, service: ScriptedService) -> None:
    terminal.wait_shown(b"decode-0")
    assert b"tiny \xc2\xb7 ready" in terminal.shown
    assert b"q ends" in terminal.shown
    service.ready = False
    terminal.wait_shown(b"tiny \xc2\xb7 not ready")
    os.write(terminal.screen, b"q")
    assert terminal.end() == 0


def test_ctrl_c_ends_top_and_gives_the_screen_back(terminal: Terminal) -> None:
    terminal.wait_shown(b"decode-0")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130


def test_top_prints_once_without_a_terminal(wire: Wire) -> None:
    done = diptych("top", "--grpc", wire.target, "--every", "0.2")
    summary, header, prefill, decode, total = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert summary.startswith("tiny · ready")
    assert header.split()[:4] == ["worker", "role", "run", "wait"]
    assert prefill.split()[:4] == ["prefill-0", "prefill", "2", "1"]
    assert decode.split()[:2] == ["decode-0", "decode"]
    assert total.split()[:5] == ["all", "2", "up", "4", "2"]


def test_top_as_json_is_what_each_worker_did(wire: Wire) -> None:
    told = json.loads(diptych("top", "--grpc", wire.target, "--every", "0.2", "--json").stdout)
    assert set(told) == {"prefill-0", "decode-0"}
    assert told["decode-0"] == {
        "generated_per_second": 0.0,
        "prompt_per_second": 0.0,
        "finished_per_second": 0.0,
        "cached_share": None,
        "occupancy": None,
        "busy": 0.0,
    }


def worker(epoch: int, **counters: float) -> WorkerStatus:
    return WorkerStatus(info=WorkerInfo(id="decode-0", epoch=epoch), counters=WorkerCounters(**counters))


def test_rates_are_differences_over_time() -> None:
    before = worker(0, tokens_emitted=100, decode_steps=10, decode_rows=40, engine_cpu_seconds=1.0)
    now = worker(
        0,
        tokens_emitted=300,
        decode_steps=20,
        decode_rows=120,
        engine_cpu_seconds=2.5,
        prompt_tokens_computed=25,
        prompt_tokens_cached=75,
        requests_finished=4,
    )
    found = rates(before, now, 2.0)
    assert (found.generated_per_second, found.occupancy, found.busy) == (100.0, 8.0, 0.75)
    assert (found.prompt_per_second, found.cached_share, found.finished_per_second) == (50.0, 0.75, 2.0)


def test_a_worker_that_was_made_again_counts_from_zero() -> None:
    found = rates(worker(0, tokens_emitted=1000), worker(1, tokens_emitted=10), 1.0)
    assert found.generated_per_second == 10.0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(shell: str) -> None:
    done = diptych("completion", shell)
    assert done.returncode == 0
    assert f"_DIPTYCH_COMPLETE={shell}_complete" in done.stdout


def test_completion_offers_commands_and_options() -> None:
    def offered(words: str, place: int) -> list[str]:
        told = diptych(_DIPTYCH_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(place)).stdout
        return [line.partition(",")[2] for line in told.splitlines()]

    assert offered("diptych st", 1)[0] == "status"
    assert "--every" in offered("diptych top --", 2)
    assert offered("diptych completion ", 2) == ["bash", "zsh", "fish"]


def test_status_turns_its_table_where_a_terminal_is_narrow(wire: Wire) -> None:
    def shown(columns: int) -> list[str]:
        inside = f"COLUMNS={columns} {sys.executable} -m cluster status --grpc {wire.target}"
        done = subprocess.run(
            ["script", "-qec", f"stty cols {columns}; {inside}", "/dev/null"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=True,
        )
        return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in done.stdout.splitlines()]

    narrow, wide = shown(80), shown(160)
    assert narrow[0].split() == ["worker", "prefill-0", "decode-0"]
    assert any(line.split() == ["free", "60", "60"] for line in narrow)
    assert max(map(len, narrow)) <= 80
    assert wide[1].split()[:2] == ["prefill-0", "prefill"]
