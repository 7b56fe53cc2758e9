"""Whether the kernels of this package can run. Imports nothing that may be missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reason_against(device: torch.device) -> str:
    """Why they can't run on this device; empty if they can."""
    if device.type != "cuda":
        return "the Triton kernels are for GPUs"
    return _reason_against_triton()


@cache
def _reason_against_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "Triton needs a C compiler at run time: install gcc"
    return ""
