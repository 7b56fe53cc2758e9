"""`diptych ask` and `diptych status` against a real gRPC front, as processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.errors import Overloaded
from diptych.types import WorkerId

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

ROOT = Path(__file__).parents[3]
WAIT_SECONDS = 30


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}"}
    return [sys.executable, "-m", "cluster", *arguments], environment


def diptych(*arguments: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(*arguments)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)


def test_ask_prints_the_answer_and_nothing_else(wire: Wire, service: ScriptedService) -> None:
    done = diptych("ask", "hello", "--grpc", wire.target, "--system", "be brief", "--max-tokens", "50", "--seed", "4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Grüß Gott\n", "")
    [ask] = service.asks
    assert b"be brief" in bytes(token for token in ask.tokens if token < 256)
    assert (ask.params.max_tokens, ask.params.temperature, ask.params.seed) == (50, 0.0, 4)


def test_ask_says_what_it_took_when_asked(wire: Wire) -> None:
    done = diptych("ask", "hello", "--grpc", wire.target, "--usage", "--json")
    said = json.loads(done.stdout)
    assert said["text"] == "Grüß Gott"
    assert said["finish_reason"] == "stop"
    assert said["usage"]["completion_tokens"] == 11
    assert said["diptych"]["how"] == "remote"
    assert "prefill prefill-0, decode decode-0" in done.stderr


def test_status_shows_every_worker(wire: Wire) -> None:
    done = diptych("status", "--grpc", wire.target)
    assert done.returncode == 0, done.stderr
    header, prefill, decode, summary = done.stdout.splitlines()
    assert header.split()[:4] == ["worker", "role", "running", "waiting"]
    assert prefill.split()[:11] == ["prefill-0", "prefill", "2", "1", "60", "10", "25", "0", "5", "25%", "2.5"]
    assert decode.split()[:2] == ["decode-0", "decode"]
    assert summary == "tiny · ready · 5 requests placed · 11 blocks indexed"


def test_status_says_who_should_be_there_and_is_not(wire: Wire, service: ScriptedService) -> None:
    service.away = ((WorkerId("decode-1"), "waits for room: it needs 2 CPU, free are 0 CPU of 4 CPU in all"),)
    done = diptych("status", "--grpc", wire.target)
    assert done.stdout.splitlines()[-1] == (
        "decode-1 is away · waits for room: it needs 2 CPU, free are 0 CPU of 4 CPU in all"
    )
    [away] = json.loads(diptych("status", "--grpc", wire.target, "--json").stdout)["away"]
    assert away["id"] == "decode-1"


def test_status_as_json_is_the_whole_status(wire: Wire) -> None:
    said = json.loads(diptych("status", "--grpc", wire.target, "--json").stdout)
    assert said["workers"][1]["counters"]["leaked_blocks"] == "7"
    assert said["workers"][1]["counters"]["preemptions"] == "0"


def test_nobody_there_exits_69_with_advice() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        for arguments in (("ask", "hello"), ("status",)):
            done = diptych(*arguments, "--grpc", target)
            assert done.returncode == 69
            assert done.stderr == f"diptych: nothing answers at {target}; is `diptych serve` running?\n"


def test_a_refusal_exits_1_with_the_fronts_words(wire: Wire, service: ScriptedService) -> None:
    service.fail_at, service.error = 0, Overloaded("64 requests wait already")
    done = diptych("ask", "hello", "--grpc", wire.target)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "diptych: 64 requests wait already\n")


def test_wrong_usage_exits_2(wire: Wire) -> None:
    assert diptych("ask", "hello", "--grpc", wire.target, "--max-tokens", "0").returncode == 2


def test_ctrl_c_cancels_the_answer_and_exits_130(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 3
    line, environment = command("ask", "hello", "--grpc", wire.target)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(3) == "Grü"
        asking.send_signal(signal.SIGINT)
        _, errors = asking.communicate(timeout=WAIT_SECONDS)
    assert (asking.returncode, errors) == (130, "diptych: interrupted\n")
    service.closed.put(service.closed.get(timeout=WAIT_SECONDS))
