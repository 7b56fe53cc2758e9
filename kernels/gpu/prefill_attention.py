"""Attention of prompt chunks over their cached prefixes and themselves, all sequences in one launch.

FlashAttention-2 (Dao 2023) with keys found through block tables. A program has a tile of one chunk's
rows and one query head; heads of a group run side by side and find each other's keys in L2. Keys
that every row of the tile sees are visited without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.paged import Look, PagedRows, RowTiles, dot_precision, tile_of


def prefill_attention(query: Tensor, layer: Tensor, rows: PagedRows, tiles: RowTiles, look: Look, out: Tensor) -> None:
    """Fills the rows of `out` that the tiles name. query, out: [rows, heads, head_dim]

    layer: [blocks, 2, kv_heads, block_size, head_dim], one layer of the arena, in any float type;
    the chunks' own keys are in it already
    """
    _, heads, dim = query.shape
    kv_heads, block_size = layer.shape[2], layer.shape[3]
    assert query.is_contiguous(), "rows of queries lie one after another"
    assert out.is_contiguous(), "and so do their results"
    assert layer.stride()[3:] == (dim, 1), "a head's keys in a block lie one after another"
    slow = dim > 128 or query.dtype == torch.float32
    _attend[heads, len(tiles.tiles)](
        query,
        layer,
        rows.positions,
        rows.starts,
        rows.ids,
        tiles.tiles,
        out,
        *look.factors,
        look.window or 0,
        *layer.stride()[:3],
        GROUP=heads // kv_heads,
        DIM=dim,
        DIM_TILE=tile_of(dim),
        BLOCK=block_size,
        ROWS=tiles.rows,
        KEYS=32 if slow else 64,
        CAPPED=look.soft_cap is not None,
        WINDOWED=look.window is not None,
        PRECISION=dot_precision(query.dtype),
        num_warps=8 if tiles.rows == 128 or query.dtype == torch.float32 else 4,
        num_stages=2 if slow else 3,
    )


@triton.jit
def _attend(
    query: tl.pointer_type,
    layer: tl.pointer_type,
    positions: tl.pointer_type,
    starts: tl.pointer_type,
    ids: tl.pointer_type,
    tiles: tl.pointer_type,
    output: tl.pointer_type,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    block_stride: tl.tensor,
    kind_stride: tl.tensor,
    head_stride: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    tile = tl.program_id(1)
    heads = tl.num_programs(0)
    first_row = tl.load(tiles + tile * 2).to(tl.int64)
    count = tl.load(tiles + tile * 2 + 1)
    start = tl.load(positions + first_row)
    table = ids + tl.load(starts + first_row)

    row = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_TILE)
    held = (row < count)[:, None] & (dims < DIM)[None, :]
    at_row = ((first_row + row) * heads + head)[:, None] * DIM + dims[None, :]
    q = tl.load(query + at_row, mask=held, other=0.0)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DIM_TILE], tl.float32)
    head_place = layer + (head // GROUP).to(tl.int64) * head_stride
    last = start + count
    begin = 0
    unmasked = (start + 1) // KEYS * KEYS
    if WINDOWED:
        begin = tl.maximum(0, start - window + 1) // KEYS * KEYS
        unmasked = begin
    for at in range(begin, unmasked, KEYS):
        top, total, found = _visit(
            q, top, total, found, head_place, table, at, start, last, scale, cap, window, block_stride, kind_stride,
            DIM, DIM_TILE, BLOCK, ROWS, KEYS, CAPPED, WINDOWED, False, PRECISION,
        )  # fmt: skip
    for at in range(unmasked, last, KEYS):
        top, total, found = _visit(
            q, top, total, found, head_place, table, at, start, last, scale, cap, window, block_stride, kind_stride,
            DIM, DIM_TILE, BLOCK, ROWS, KEYS, CAPPED, WINDOWED, True, PRECISION,
        )  # fmt: skip
    # Every row sees its own key; the rows beyond the tile's end, which are not stored, may see none.
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(output + at_row, found.to(output.dtype.element_ty), mask=held)


@triton.jit
def _visit(
    q: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    found: tl.tensor,
    head_place: tl.pointer_type,
    table: tl.pointer_type,
    at: tl.tensor,
    start: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    block_stride: tl.tensor,
    kind_stride: tl.tensor,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """One tile of keys: the running maximum, sum and output after it."""
    dims = tl.arange(0, DIM_TILE)
    keys_at = at + tl.arange(0, KEYS)
    there_is = keys_at < last
    block = tl.load(table + keys_at // BLOCK, mask=there_is, other=0).to(tl.int64)
    there = head_place + (block * block_stride + (keys_at % BLOCK) * DIM)[:, None] + dims[None, :]
    read = there_is[:, None] & (dims < DIM)[None, :]
    keys = tl.load(there, mask=read, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if CAPPED:
        scores = cap * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
    if MASKED:
        position = start + tl.arange(0, ROWS)
        # A row beyond the tile's end must not see a key beyond the last: nothing is there.
        seen = (keys_at[None, :] <= position[:, None]) & there_is[None, :]
        if WINDOWED:
            seen = seen & (keys_at[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum; its weights are zeros either way.
    base = highest
    if MASKED:
        base = tl.where(highest == float("-inf"), 0.0, highest)
    kept = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * kept + tl.sum(weights, 1)
    values = tl.load(there + kind_stride, mask=read, other=0.0).to(q.dtype)
    found = found * kept[:, None] + tl.dot(weights.to(q.dtype), values, input_precision=PRECISION)
    return highest, total, found
