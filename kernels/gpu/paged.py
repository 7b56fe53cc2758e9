"""Which rows a batch has and where each one's keys lie. Knows sequences as runs of rows, nothing more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


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

    @property
    def factors(self) -> tuple[float, float]:
        """What a score is multiplied by before and after it is squeezed; powers are of 2 then, not of e."""
        if self.soft_cap is None:
            return self.scale / math.log(2), 1.0
        return self.scale / self.soft_cap, self.soft_cap / math.log(2)


class RowTiles(NamedTuple):
    """Chunks, cut into tiles of rows that a program can hold."""

    tiles: Tensor
    """[tiles, 2] int32: the batch's row that each begins at, and how many it has."""
    rows: int
    """The most that one has: 64 or 128."""


def tile_rows(longest: int, head_dim: int, dtype: torch.dtype) -> int:
    """`RowTiles.rows` for a batch whose longest chunk has so many tokens."""
    return 64 if longest <= 64 or head_dim > 128 or dtype == torch.float32 else 128


def row_tiles(chunks: Sequence[tuple[int, int, int]], rows: int) -> NDArray[np.int32]:
    """chunks: (first row, rows, position of the first) → `RowTiles.tiles`, those with the most keys first."""
    tiles = [
        (start + at, first + at, min(rows, count - at))
        for first, count, start in chunks
        for at in range(0, count, rows)
    ]
    tiles.sort(key=lambda tile: -tile[0])
    return np.array([tile[1:] for tile in tiles], dtype=np.int32).reshape(-1, 2)


def dot_precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies these: fp32 as it is, and not in the 19 bits that tensor cores make of it."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tile_of(size: int) -> int:
    """The least number of columns a kernel can work on that holds `size`: a power of two, 16 or more."""
    return max(16, 1 << (size - 1).bit_length())
