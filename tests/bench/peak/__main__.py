"""The most that this processor multiplies, beside what a prompt needs: the bound of any engine's prefill.

PYTHONPATH=.:proto python -m tests.bench.peak
"""

from __future__ import annotations

import argparse
import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from diptych.compiling import compiled_library
from tests.bench.results import Figure, figure, report

if TYPE_CHECKING:
    from collections.abc import Callable

_CHAINS: Final = 16
_OPERATIONS: Final = {"bf16": 64, "int8": 128}
"""Of one instruction: 16 sums of 2 or 4 products each."""
_NEEDED: Final = frozenset({"avx512f", "avx512_bf16", "avx512_vnni"})
_STEPS: Final = 10_000_000


def rate(library: ctypes.CDLL, of: str, threads: int, team: ThreadPoolExecutor) -> float:
    """Operations a second, all threads at once."""
    work: Callable[[int], float] = getattr(library, f"peak_{of}")
    seconds = max(team.map(work, [_STEPS] * threads))  # ctypes lets go of the lock meanwhile
    return threads * _STEPS * _CHAINS * _OPERATIONS[of] / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parameters", type=float, default=106.2e6, help="in the layers' products; SmolLM2-135M's")
    parser.add_argument("--prompt", type=int, default=512)
    args = parser.parse_args()
    library = compiled_library(Path(__file__).with_name("native"), None, needed=_NEEDED)
    for of in _OPERATIONS:
        function = getattr(library, f"peak_{of}")
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
    figures: list[Figure] = []
    with ThreadPoolExecutor(args.threads) as team:
        found: dict[str, list[float]] = {of: [] for of in _OPERATIONS}
        for _ in range(args.rounds):
            for of, rates in found.items():
                rates.append(rate(library, of, args.threads, team))
    for of, rates in found.items():
        case = f"{of}, {args.threads} threads"
        figures.append(figure(case, "peak", "Gop/s", [each / 1e9 for each in rates]))
        needs = 2 * args.parameters * args.prompt
        figures.append(figure(case, f"{args.prompt} tokens at least", "ms", [1e3 * needs / each for each in rates]))
    report("peak", figures)


if __name__ == "__main__":
    main()
