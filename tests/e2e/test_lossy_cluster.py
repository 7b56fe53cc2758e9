"""What the scheduler believes of caches in other processes, when reports get lost on the way: live, under Ray."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.full]

SCRIPT = Path(__file__).parent / "live" / "lossy_cluster.py"
WAIT_SECONDS = 600


@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_is_exact_and_the_index_is_the_truth_soon_after_the_wire_is_calm(seed: int) -> None:
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = os.environ | ray | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(seed), "120"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    print(f"\n{ran.stdout}")
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-5000:]}"
