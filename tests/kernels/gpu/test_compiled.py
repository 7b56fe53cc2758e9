"""Every kernel compiles for an H200, fits its processor and keeps its numbers in registers. Runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

SHARED_BYTES = 227 << 10
"""That one program may have on compute capability 9.0."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_an_h200_and_fits(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gpu.compiled"],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert not done.returncode, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) > 50
    wrong = [each for each in kernels if each["shared_bytes"] > SHARED_BYTES]
    # fp32 is for tests and for lossless granules: what the model runs on is bf16.
    wrong += [each for each in kernels if each["stack_bytes"] and "float32" not in each["case"]]
    assert not wrong, wrong
