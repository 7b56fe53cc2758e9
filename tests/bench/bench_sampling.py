"""What choosing 32 tokens costs, beside sorting the whole vocabulary row by row.

PYTHONPATH=.:proto python tests/bench/bench_sampling.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import kernels

ROWS, VOCABULARY, REPEATS = 32, 49_152, 9


def by_sorting(logits: Tensor, how: kernels.Sampling) -> Tensor:
    """The obvious way, and the first one we had."""
    rows = zip(logits, *how, strict=True)
    return torch.stack([_draw_by_sorting(*row) for row in rows])


def _draw_by_sorting(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    values, ids = torch.sort(logits / temperature.float(), descending=True, stable=True)
    values = values[: int(top_k)] if top_k else values
    weights = values.double().softmax(-1)
    line = weights.cumsum(-1)
    kept = 1 + int((line[:-1] < top_p).sum()) if top_p < 1 else len(line)
    kept = min(kept, max(1, int((weights >= min_p * weights[0]).sum()))) if min_p > 0 else kept
    at = torch.searchsorted(line[:kept], uniform * line[kept - 1], right=True)
    return ids[at.clamp_max(kept - 1)]


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Processor time of this thread, the best of `repeats`: neighbours don't count."""
    best = float("inf")
    for _ in range(repeats):
        begun = time.thread_time()
        work()
        best = min(best, time.thread_time() - begun)
    return best * 1e3


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    logits = torch.randn((ROWS, VOCABULARY), generator=generator)
    print(f"{ROWS} rows, {VOCABULARY} tokens, one thread, milliseconds")
    print(f"{'logits':10} {'parameters':24} {'sorting':>9} {'ours':>9} {'ratio':>7}")
    for name, scale in (("peaked", 8.0), ("uneven", 4.0), ("flat", 0.5)):
        for words, temperature, top_k, top_p in (
            ("plain", 1.0, 0, 1.0),
            ("0.8, top_p", 0.8, 0, 0.95),
            ("0.8, top_k", 0.8, 50, 1.0),
        ):
            columns = [torch.full((ROWS,), value, dtype=torch.float64) for value in (temperature, top_p, 0.0)]
            how = kernels.Sampling(columns[0], torch.full((ROWS,), top_k), columns[1], columns[2], noise)
            case = logits * scale
            before = milliseconds(lambda case=case, how=how: by_sorting(case, how), 2)
            after = milliseconds(lambda case=case, how=how: kernels.sample_tokens(case, how), REPEATS)
            assert torch.equal(by_sorting(case, how), kernels.sample_tokens(case, how))
            print(f"{name:10} {words:24} {before:9.1f} {after:9.1f} {before / after:7.1f}")


if __name__ == "__main__":
    main()
