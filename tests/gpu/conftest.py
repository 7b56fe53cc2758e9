"""A CUDA device, or a loud skip."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: run tests/gpu/run on a machine that has one")
    return torch.device("cuda", 0)
