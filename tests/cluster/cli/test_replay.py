"""`diptych replay` against a real gRPC front, as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.errors import Overloaded

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

ROOT = Path(__file__).parents[3]
LINES = (
    {"timestamp": 0, "input_length": 300, "output_length": 3, "hash_ids": [1]},
    {"timestamp": 40, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
    {"timestamp": 60, "input_length": 200, "output_length": 2, "hash_ids": [3]},
)


def replay(wire: Wire, file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}"}
    line = [sys.executable, "-m", "cluster", "replay", str(file), "--grpc", wire.target, *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=30, check=False)


def trace_of(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def test_a_trace_is_sent_as_tokens_and_its_figures_are_told(
    wire: Wire, service: ScriptedService, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    done = replay(wire, trace_of(tmp_path, *LINES), "--json", str(file), "--speed", "2")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("trace.jsonl: 2 of 2 requests answered in ")
    assert "  1 requests longer than 512 tokens left out" in said
    assert said[-1].split() == ["predictions", "none", "were", "recorded"]
    assert sorted(len(ask.tokens) for ask in service.asks) == [200, 300]
    assert {ask.params.max_tokens for ask in service.asks} == {2, 3}
    assert all(len(ask.params.forced) == ask.params.max_tokens for ask in service.asks)
    found = json.loads(file.read_text())
    assert found["answered"] == 2
    assert [each["tokens"] for each in found["played"]] == [2, 2]  # "ü" is two tokens, and would be too many


def test_refusals_are_counted_by_reason(wire: Wire, service: ScriptedService, tmp_path: Path) -> None:
    service.fail_at, service.error = 0, Overloaded("64 requests wait already")
    done = replay(wire, trace_of(tmp_path, *LINES), "--shrink", "2", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert "  2 ended in overloaded" in done.stdout.splitlines()


def test_what_is_no_trace_exits_2_and_names_the_line(wire: Wire, tmp_path: Path) -> None:
    done = replay(wire, trace_of(tmp_path, LINES[0], {"timestamp": 1}))
    assert done.returncode == 2
    assert "trace.jsonl:2: input_length: Field required" in done.stderr
