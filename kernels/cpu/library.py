"""The kernels written in C++, compiled on the machine that runs them (6 s, once). Knows no tensor.

Without a compiler, or on another processor, there is none, and `kernels.reference` does the work.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from diptych.compiling import NoLibrary, compiled_library

__all__ = ["NoLibrary", "load_library"]

_SOURCES = Path(__file__).with_name("native")
_NEEDED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "f16c", "fma"})


def load_library(folder: Path | None) -> ctypes.CDLL:
    """As `compiled_library`. Raises NoLibrary."""
    return compiled_library(_SOURCES, folder, needed=_NEEDED)
