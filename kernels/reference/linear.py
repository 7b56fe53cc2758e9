"""Matrix products whose rows don't depend on their neighbours. Knows weights, not layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def row_tile() -> int:
    """Rows that make a product's kernel independent of the batch.

    With fewer than 4 rows a thread runs other code (a vector product) and sums in another order,
    and rows are split evenly between threads: 4 rows for each keep every split at 4 or more.
    """
    return 4 * torch.get_num_threads()


def pad_rows(x: Tensor) -> Tensor:
    """x: [..., rows, columns], rows padded with zeros to a whole number of tiles."""
    missing = -x.shape[-2] % row_tile()
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [rows, in]  weight: [out, in]  bias: [out]  → [rows, out].

    In fp32 a row's bits are the same whatever other rows are in the batch.
    """
    if x.dtype != torch.float32 or x.is_cuda:
        return functional.linear(x, weight, bias)
    return functional.linear(pad_rows(x), weight, bias)[: x.shape[0]]
