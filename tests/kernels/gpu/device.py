"""The same tests in Triton's interpreter, on CPU tensors, and compiled, on a GPU: whichever this machine can.

Triton decides between the two when it is imported, so one process does one of them. Conftests import this: first.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def bf16_in_the_interpreter() -> None:
    if INTERPRETED and find_spec("triton"):
        from tests.kernels.gpu.interpreter import mend

        mend()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "interpreter" and not INTERPRETED:
        pytest.skip("compiled here; TRITON_INTERPRET=1 interprets")
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("needs a CUDA GPU: run tests/gpu/run on a machine that has one")
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")
