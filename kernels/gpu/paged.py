"""Which rows a batch has and where each one's keys lie. Knows sequences as runs of rows, nothing more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PagedRows(NamedTuple):
    """All rows of a batch, on the device."""

    positions: Tensor
    """[rows] int32. -1: the row only pads the batch; it has no keys and writes none, and its start is 0."""
    starts: Tensor
    """[rows] int32: where in `ids` the block table of the row's sequence begins."""
    ids: Tensor
    """Block ids, int32, table after table, each as long as its sequence needs."""

    def part(self, rows: slice) -> PagedRows:
        """Some of the rows, the same memory."""
        return PagedRows(self.positions[rows], self.starts[rows], self.ids)


class Look(NamedTuple):
    """How a layer's queries look back."""

    scale: float
    window: int | None = None
    """Keys that a query sees, its own included."""
    soft_cap: float | None = None
    """Scores are squeezed into ± this."""


def dot_precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies these: fp32 as it is, and not in the 19 bits that tensor cores make of it."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tile_of(size: int) -> int:
    """The least number of columns a kernel can work on that holds `size`: a power of two, 16 or more."""
    return max(16, 1 << (size - 1).bit_length())
