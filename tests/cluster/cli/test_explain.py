"""`diptych explain` against a real gRPC front, as a process: words for a newcomer, everything for a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.types import (
    Candidate,
    CostTerm,
    Explanation,
    Outcome,
    PlacedAt,
    Placement,
    Prediction,
    RequestId,
    Served,
    WorkerId,
)

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

ROOT = Path(__file__).parents[3]
P, D = WorkerId("prefill-0"), WorkerId("decode-1")
PLACEMENT = Placement(
    decode=D,
    prefill=P,
    how="remote",
    reason="prefill-0 computes 512 of 1,500 prompt tokens",
    candidates=(
        Candidate(prefill=P, decode=D, how="remote", terms=(CostTerm("queue", 0.25), CostTerm("transfer", 0.0))),
        Candidate(prefill=None, decode=D, how="local", terms=(CostTerm("queue", 0.5), CostTerm("transfer", 0.0))),
    ),
    predicted=Prediction(0.25, 0.3, 0.02, 988, 2_000_000),
)
RECORD = Explanation(
    request=RequestId("cmpl-7~ab"),
    tenant="acme",
    priority=-1,
    prompt_tokens=1500,
    max_tokens=64,
    ttft_seconds=2.0,
    itl_seconds=None,
    deadline_seconds=None,
    age_seconds=12.0,
    placements=(PlacedAt(placement=PLACEMENT, seconds=0.01),),
    refusal="",
    outcome=Outcome(
        RequestId("cmpl-7~ab"),
        0.01,
        0.35,
        0.021,
        64,
        Served(
            how="remote",
            prefill_worker=P,
            decode_worker=D,
            prompt_tokens_computed=512,
            cached_tokens=988,
            kv_blocks_sent=32,
            kv_bytes_sent=2_100_000,
            kv_seconds=0.004,
            kv_wait_seconds=0.001,
        ),
    ),
    ended_seconds=1.683,
)


def explain(wire: Wire, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}"}
    line = [sys.executable, "-m", "cluster", "explain", "--grpc", wire.target, *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_a_record_is_told_in_words_tables_and_times(wire: Wire, service: ScriptedService) -> None:
    service.explanations["cmpl-7"] = (RECORD,)
    done = explain(wire, "cmpl-7")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "Request cmpl-7~ab",
        "1,500 prompt tokens, at most 64 to answer, tenant acme, priority -1",
        "first token within 2,000.0 ms, asked 12.0 s ago",
        "Where it ran, and why",
        "→ remote prefill-0 decode-1 250.0 250.0",
        "local - decode-1 500.0 500.0",
        "first token after 300.0 ms 350.0 ms",
        "prompt tokens cached 988 988",
        "KV sent 2.00 MB 2.10 MB",
        "not hidden behind computing 1.0 ms",
        "10.0 ms placed on prefill-0 and decode-1",
        "360.0 ms first token",
        "1,683.0 ms over: complete, 64 tokens",
    ):
        assert any(line in each for each in lines), f"{line!r} is not in:\n{done.stdout}"
    assert "Because: prefill-0 computes 512 of 1,500 prompt tokens." in " ".join(lines)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_as_json_it_is_the_whole_record(wire: Wire, service: ScriptedService) -> None:
    service.explanations["cmpl-7"] = (RECORD, RECORD)
    said = json.loads(explain(wire, "cmpl-7", "--json").stdout)
    [told, _] = said["explanations"]
    assert told["placements"][0]["predicted"]["cached_tokens"] == "988"
    assert told["placements"][0]["candidates"][1]["cost_seconds"] == 0.5
    assert told["outcome"]["served"]["kv_bytes_sent"] == "2100000"


def test_an_id_that_nobody_kept_exits_1_and_says_how_many_are(wire: Wire) -> None:
    done = explain(wire, "gone")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "diptych: no record of 'gone': the last 4,096 requests are kept\n"
