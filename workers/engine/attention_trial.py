"""Two implementations of attention on the same random problem: whether they agree, and which is faster.

Numbers are drawn in the model's shapes: a mixed step over scattered blocks of one of two layers, as the
arena has them, with NaN wherever no key lies.
"""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kernels import Segment
from kernels.gpu.attention import Attend, Attention
from kernels.gpu.paged import Look, tile_rows
from workers.engine.batch import Batch
from workers.engine.row_numbers import device_batch, longest_chunk

Part: TypeAlias = Literal["decode", "prefill"]

NEAR: Final = 2e-2
"""How far, in units and of the number, two that round to bf16 may lie apart: what tests allow each of them."""
_WINDOW: Final = 37
_SOFT_CAP: Final = 5.0
"""Small enough that a wrong one shows; kernels are told these as numbers."""
_SPREAD: Final = 2.0
"""Of scores, so that some keys weigh much and a wrong one shows."""
_ROUNDS: Final = 5


class Shape(NamedTuple):
    """What attention knows of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    looks: tuple[Look, ...]
    """Of each layer."""


class Lengths(NamedTuple):
    """Of a step's sequences."""

    decodes: tuple[int, ...]
    """Keys of each row, its own included, falling."""
    chunks: tuple[tuple[int, int], ...]
    """(cached before it, rows) of each."""


CHECKED: Final = Lengths(
    (700, 515, 300, 130, 65, 33, 17, 16, 1), ((0, 150), (3, 4), (64, 136), (600, 1), (513, 70), (0, 1))
)
TIMED: Final = Lengths((1024,) * 32, ((0, 1024), (1024, 512), (512, 512)))


def difference(
    part: Part,
    ours: Attention,
    theirs: Attention,
    shape: Shape,
    device: torch.device,
    lengths: Lengths = CHECKED,
    *,
    small: bool = True,
) -> float:
    """The largest, as a share of what rounding explains: above 1 they disagree. Infinite where a number is missing,
    or one is written that belongs to the other part. small: windows and caps are made so"""
    problem = _Problem(shape, lengths, device)
    decoding, chunks = slice(0, len(lengths.decodes)), slice(len(lengths.decodes), None)
    rows, others = (decoding, chunks) if part == "decode" else (chunks, decoding)
    worst = 0.0
    for look in dict.fromkeys(map(_made_small, shape.looks) if small else shape.looks):
        wanted, found = (problem.computed(getattr(each, part), look) for each in (ours, theirs))
        if not found[others].isnan().all():
            return torch.inf
        off = (found[rows] - wanted[rows]).abs() / (NEAR * (1 + wanted[rows].abs()))
        worst = max(worst, float(off.nan_to_num(nan=torch.inf).max()))
    return worst


def pace(
    part: Part, ours: Attention, theirs: Attention, shape: Shape, device: torch.device, lengths: Lengths = TIMED
) -> float:
    """Of theirs, as a multiple of ours', in one step's layers: planning and launching counts."""
    problem = _Problem(shape, lengths, device)
    ways: tuple[Attend, Attend] = (getattr(ours, part), getattr(theirs, part))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + _ROUNDS):
        for attend, spent in zip(ways, seconds, strict=True):
            spent.append(problem.seconds(attend, shape.looks))
    first, second = (min(each[1:]) for each in seconds)
    return first / second


class _Problem:
    def __init__(self, shape: Shape, lengths: Lengths, device: torch.device) -> None:
        ends = [*lengths.decodes, *(start + count for start, count in lengths.chunks)]
        needed = [-(-end // shape.block_size) for end in ends]
        order = Random(1).sample(range(sum(needed) + 1), sum(needed) + 1)
        tables = [[order.pop() for _ in range(count)] for count in needed]
        spans = [*((end - 1, 1) for end in lengths.decodes), *lengths.chunks]
        segments = [Segment(*span, table) for span, table in zip(spans, tables, strict=True)]
        rows = sum(count for _, count in spans)

        self._device, random = device, torch.Generator(device).manual_seed(2)
        arena_shape = (sum(needed) + 1, 2, 2, shape.kv_heads, shape.block_size, shape.head_dim)
        arena = torch.randn(arena_shape, generator=random, device=device, dtype=shape.dtype)
        arena[order] = torch.nan
        for table, end in zip(tables, ends, strict=True):
            arena[table[-1], ..., (end - 1) % shape.block_size + 1 :, :] = torch.nan
        self._layer = arena[:, 1]
        query_shape = (rows, shape.heads, shape.head_dim)
        query = torch.randn(query_shape, generator=random, device=device, dtype=shape.dtype)
        self._query = query * (_SPREAD / shape.looks[0].scale / shape.head_dim**0.5)
        batch = Batch(tokens=[0] * rows, segments=segments, decode_rows=len(lengths.decodes), wanted=[])
        tile = tile_rows(longest_chunk(batch), shape.head_dim, shape.dtype)
        self._batch = device_batch(batch, shape.block_size, tile, device)

    def computed(self, attend: Attend, look: Look) -> Tensor:
        """[rows, heads, head_dim] fp32, NaN where nothing was written"""
        out = torch.full_like(self._query, torch.nan)
        attend(self._query, self._layer, self._batch, look, out)
        return out.float()

    def seconds(self, attend: Attend, looks: tuple[Look, ...]) -> float:
        """For layers that look so, from the first call until the device is done."""
        # Another object: what is planned for a batch is planned again.
        batch, out = replace(self._batch), torch.empty_like(self._query)
        self._wait()
        begin = time.perf_counter()
        for look in looks:
            attend(self._query, self._layer, batch, look, out)
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _made_small(look: Look) -> Look:
    return Look(
        look.scale,
        None if look.window is None else min(look.window, _WINDOW),
        None if look.soft_cap is None else min(look.soft_cap, _SOFT_CAP),
    )
