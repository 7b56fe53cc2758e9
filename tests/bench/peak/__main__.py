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
_OPERATIONS: Final = 64
"""Of one instruction: 16 sums of 2 products each."""
_NEEDED: Final = frozenset({"avx512f", "avx512_bf16"})
_STEPS: Final = 10_000_000


def peak_work() -> Callable[[int], float]:
    """Steps of `_CHAINS` instructions each, in registers alone → seconds they took."""
    work = compiled_library(Path(__file__).with_name("native"), None, needed=_NEEDED).peak_bf16
    work.argtypes, work.restype = [ctypes.c_int64], ctypes.c_double
    return work


def rate(work: Callable[[int], float], threads: int, team: ThreadPoolExecutor) -> float:
    """Operations a second, all threads at once."""
    seconds = max(team.map(work, [_STEPS] * threads))  # ctypes lets go of the lock meanwhile
    return threads * _STEPS * _CHAINS * _OPERATIONS / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parameters", type=float, default=106.2e6, help="in the layers' products; SmolLM2-135M's")
    parser.add_argument("--prompt", type=int, default=512)
    args = parser.parse_args()
    work = peak_work()
    with ThreadPoolExecutor(args.threads) as team:
        rates = [rate(work, args.threads, team) for _ in range(args.rounds)]
    case, needs = f"bf16, {args.threads} threads", 2 * args.parameters * args.prompt
    figures: list[Figure] = [
        figure(case, "peak", "Gop/s", [each / 1e9 for each in rates]),
        figure(case, f"{args.prompt} tokens at least", "ms", [1e3 * needs / each for each in rates]),
    ]
    report("peak", figures)


if __name__ == "__main__":
    main()
