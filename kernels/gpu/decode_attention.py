"""Attention of one new token per sequence over the paged cache, its keys shared out among programs.

Split-KV as in Flash-Decoding (Dao 2023): the keys of each (row, KV head) are cut into `splits` equal
shares, each share's softmax is taken alone, and a second kernel merges them by their log-sum-exp.
The shares follow from the row's length on the device, so one launch, and one captured graph, serves
any length. A program takes all query heads of a KV head at once: keys are read once for the group,
and the products are wide enough for tensor cores.

Keys past a row's end are not read: a block may hold anything there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.paged import Look, PagedRows, dot_precision, tile_of

_MOST_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 8
"""Enough to hide the latency of memory, and to even out rows of different lengths."""


def split_count(rows: int, kv_heads: int, processors: int) -> int:
    """Shares for each row's keys, a power of two, so that the device is full."""
    wanted = max(1, processors * _PROGRAMS_PER_PROCESSOR // (rows * kv_heads))
    return min(_MOST_SPLITS, 1 << (wanted.bit_length() - 1))


def decode_attention(
    query: Tensor, layer: Tensor, rows: PagedRows, look: Look, splits: int, out: Tensor | None = None
) -> Tensor:
    """query: [rows, heads, head_dim] → the same shape, in `out` if given; rows that pad get zeros.

    layer: [blocks, 2, kv_heads, block_size, head_dim], one layer of the arena, in any float type
    splits: `split_count`
    """
    count, heads, dim = query.shape
    kv_heads, block_size = layer.shape[2], layer.shape[3]
    assert query.is_contiguous(), "rows of queries lie one after another"
    assert layer.stride()[3:] == (dim, 1), "a head's keys in a block lie one after another"
    output = torch.empty_like(query) if out is None else out
    assert output.is_contiguous(), "and so do their results"
    parts, sums = output, output
    if splits > 1:
        parts = torch.empty((count, heads, splits, dim), dtype=torch.float32, device=query.device)
        sums = torch.empty((count, heads, splits), dtype=torch.float32, device=query.device)
    wide = dim > 128 or query.dtype == torch.float32
    _attend[count, kv_heads, splits](
        query,
        layer,
        rows.positions,
        rows.starts,
        rows.ids,
        parts,
        sums,
        *look.factors,
        look.window or 0,
        *layer.stride()[:3],
        GROUP=heads // kv_heads,
        GROUP_TILE=tile_of(heads // kv_heads),
        DIM=dim,
        DIM_TILE=tile_of(dim),
        BLOCK=block_size,
        KEYS=32 if wide else 64,
        SPLITS=splits,
        CAPPED=look.soft_cap is not None,
        WINDOWED=look.window is not None,
        PRECISION=dot_precision(query.dtype),
        num_warps=4,
        num_stages=2 if wide else 3,
    )
    if splits > 1:
        _merge[count, heads](parts, sums, output, DIM=dim, DIM_TILE=tile_of(dim), SPLITS=splits, num_warps=4)
    return output


@triton.jit
def _attend(
    query: tl.pointer_type,
    layer: tl.pointer_type,
    positions: tl.pointer_type,
    starts: tl.pointer_type,
    ids: tl.pointer_type,
    parts: tl.pointer_type,
    sums: tl.pointer_type,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    block_stride: tl.tensor,
    kind_stride: tl.tensor,
    head_stride: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # A row's output, or a share's, begins at a 64-bit place: [rows, heads, splits, dim] can pass 2**31.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    length = tl.load(positions + row) + 1
    table = ids + tl.load(starts + row)

    first = 0
    if WINDOWED:
        first = tl.maximum(0, length - window)
    share = tl.cdiv(tl.cdiv(length - first, KEYS), SPLITS) * KEYS
    begin = first + split * share
    end = tl.minimum(length, begin + share)

    members = tl.arange(0, GROUP_TILE)
    dims = tl.arange(0, DIM_TILE)
    head = kv_head * GROUP + members
    held = (members < GROUP)[:, None] & (dims < DIM)[None, :]
    q = tl.load(query + (row * heads + head)[:, None] * DIM + dims[None, :], mask=held, other=0.0)

    top = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    found = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
    for at in range(begin, end, KEYS):
        keys_at = at + tl.arange(0, KEYS)
        seen = keys_at < end
        block = tl.load(table + keys_at // BLOCK, mask=seen, other=0).to(tl.int64)
        place = block * block_stride + kv_head * head_stride + (keys_at % BLOCK) * DIM
        there = layer + place[:, None] + dims[None, :]
        read = seen[:, None] & (dims < DIM)[None, :]
        keys = tl.load(there, mask=read, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # Each tile has a key that is seen, so from the first on the maximum is a number.
        highest = tl.maximum(top, tl.max(scores, 1))
        kept = tl.exp2(top - highest)
        weights = tl.exp2(scores - highest[:, None])
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(there + kind_stride, mask=read, other=0.0).to(q.dtype)
        found = found * kept[:, None] + tl.dot(weights.to(q.dtype), values, input_precision=PRECISION)
        top = highest

    # Nothing seen: zeros, which weigh nothing.
    empty = total == 0.0
    found = found / tl.where(empty, 1.0, total)[:, None]
    at_part = ((row * heads + head) * SPLITS + split)[:, None] * DIM + dims[None, :]
    tl.store(parts + at_part, found.to(parts.dtype.element_ty), mask=held)
    if SPLITS > 1:
        weight = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(sums + (row * heads + head) * SPLITS + split, weight, mask=members < GROUP)


@triton.jit
def _merge(
    parts: tl.pointer_type,
    sums: tl.pointer_type,
    output: tl.pointer_type,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM_TILE)
    held = dims < DIM
    weight = tl.load(sums + place * SPLITS + splits)
    top = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top))
    part = tl.load(parts + (place * SPLITS + splits)[:, None] * DIM + dims[None, :], mask=held[None, :], other=0.0)
    total = tl.sum(weight, 0)
    merged = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + place * DIM + dims, merged.to(output.dtype.element_ty), mask=held)
