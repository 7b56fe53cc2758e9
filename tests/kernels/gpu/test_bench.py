"""The GPU benchmark runs from end to end: what breaks must not break first on a lent machine."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

from tests.gpu import bench_engine
from workers.engine.random_weights import random_shape


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_every_part_measures(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    bench = bench_engine.Bench(device, bench_engine.SMALL)
    assert bench_engine.run(bench) == 0, capsys.readouterr().err
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    cases = [each["case"] for each in printed]
    wanted = ("copy", "product 64", "attention 2 at 64", "decode 1 at 40", "decode 4 at 24", "prefill 40")
    wanted += ("decode 1 at 40, no graphs", "decode 4 at 24, int8 weights", "decode 4 at 24, fp8 weights")
    wanted += ("transformers, prefill 40", "transformers, decode 1 at 40", "transformers, decode 4 at 24")
    assert not set(wanted) - set(cases)
    assert all(each["low"] <= each["milliseconds"] <= each["high"] and each["n"] == 2 for each in printed)


def test_a_broken_part_and_a_missed_bar_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    bench = bench_engine.Bench(torch.device("cpu"), bench_engine.SMALL)
    bench.part("fine", lambda: bench.add(bench_engine.row("good", [1.0, 2.0, 9.0], bound=1.9, bar=0.9)))
    assert bench_engine._told(bench) == 0
    bench.add(bench_engine.row("slow", [2.0], bound=1.0, bar=0.9))
    assert bench_engine._told(bench) == 1

    def broken() -> None:
        raise RuntimeError("no such kernel")

    bench.part("attention", broken)
    assert bench_engine._told(bench) == 1
    told = capsys.readouterr().err
    assert "no such kernel" in told
    assert "BROKEN: attention" in told
    assert "BELOW ITS BAR: slow" in told


def test_an_8b_decode_step_reads_15_gigabytes() -> None:
    config = random_shape("random:llama-8b")
    assert bench_engine.read_bytes(config, 1, 0) == pytest.approx(15.01e9, rel=0.01)
    assert bench_engine.read_bytes(config, 64, 1024) - bench_engine.read_bytes(config, 64, 0) == 64 * 1024 * 131072
    assert bench_engine.prompt_flops(config, 2048) == pytest.approx(2048 * 2 * 6.98e9 + 1.1e12 / 2, rel=0.05)
