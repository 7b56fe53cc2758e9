"""A batch as a GPU reads it: a few rows of int32, for one copy to the device. Knows no sequence and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels import Segment
from kernels.gpu.paged import PagedRows, RowTiles, row_tiles
from workers.engine.batch import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """int32 throughout; what each is, `PagedRows` says."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    starts: NDArray[np.int32]
    ids: NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """A batch on its device: decode rows first, then prompt chunks."""

    tokens: Tensor
    """[rows] int32"""
    rows: PagedRows
    decode_rows: int
    tiles: RowTiles | None
    """Of the chunks, if there are any."""
    wanted: Tensor | None
    """[wanted] int32, rows whose logits are wanted; None: all, in order."""
    segments: Sequence[Segment] = ()
    """What the batch was made of, for attention that plans on the host; none where a graph reads it."""


def row_numbers(tokens: Sequence[int], segments: Sequence[Segment], block_size: int) -> RowNumbers:
    """segments: of `tokens`, in this order"""
    counts = np.array([segment.count for segment in segments], dtype=np.int32)
    firsts = np.array([segment.start for segment in segments], dtype=np.int32)
    lengths = (firsts + counts + block_size - 1) // block_size
    ends = np.cumsum(counts)
    within = np.arange(len(tokens), dtype=np.int32) - np.repeat(ends - counts, counts)
    tables = (segment.blocks[:length] for segment, length in zip(segments, lengths.tolist(), strict=True))
    return RowNumbers(
        tokens=np.array(tokens, dtype=np.int32),
        positions=(np.repeat(firsts, counts) + within).astype(np.int32),
        starts=np.repeat(np.cumsum(lengths) - lengths, counts).astype(np.int32),
        ids=np.fromiter(chain.from_iterable(tables), np.int32, int(lengths.sum())),
    )


def device_batch(batch: Batch, block_size: int, tile_rows: int, device: torch.device) -> DeviceBatch:
    """In one copy. tile_rows: `RowTiles.rows`"""
    numbers = row_numbers(batch.tokens, batch.segments, block_size)
    tiles = row_tiles(_chunks(batch), tile_rows)
    parts = (
        numbers.tokens,
        numbers.positions,
        numbers.starts,
        np.array(batch.wanted, dtype=np.int32),
        tiles.reshape(-1),
        numbers.ids,
    )
    there = torch.from_numpy(np.concatenate(parts)).to(device)  # pyright: ignore[reportUnknownMemberType]
    tokens, positions, starts, wanted, cut, ids = torch.split_with_sizes(there, [len(part) for part in parts])
    return DeviceBatch(
        tokens=tokens,
        rows=PagedRows(positions, starts, ids),
        decode_rows=batch.decode_rows,
        tiles=RowTiles(cut.view(-1, 2), tile_rows) if len(cut) else None,
        wanted=wanted,
        segments=batch.segments,
    )


def longest_chunk(batch: Batch) -> int:
    """Tokens of the longest prompt chunk; 0 without one."""
    return max((segment.count for segment in batch.segments[batch.decode_rows :]), default=0)


def _chunks(batch: Batch) -> list[tuple[int, int, int]]:
    """(first row, rows, position of the first) of each prompt chunk."""
    chunks: list[tuple[int, int, int]] = []
    row = batch.decode_rows
    for segment in batch.segments[batch.decode_rows :]:
        chunks.append((row, segment.count, segment.start))
        row += segment.count
    return chunks
