"""From a layer's query, key and value product to turned queries and a filled cache, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.fp8 import narrowed
from kernels.gpu.paged import PagedRows

_HEADS = 8
"""In one program: a warp for two of them."""


class HeadNorms(NamedTuple):
    """What each head's query and key pass before they turn. [head_dim] each"""

    query: Tensor
    key: Tensor
    epsilon: float


def turn_and_write(qkv: Tensor, layer: Tensor, rows: PagedRows, table: Tensor, norms: HeadNorms | None) -> Tensor:
    """The turned queries, [rows, heads, head_dim]; keys and values go where the block tables say.

    qkv: [rows, (heads + 2 * kv_heads) * head_dim]
    layer: [blocks, 2, kv_heads, block_size, head_dim], one layer of the arena, in any float type
    table: [positions, 2, head_dim] fp32, of `kernels.reference.elementwise.rope_table`
    """
    count, width = qkv.shape
    kv_heads, block_size, dim = layer.shape[2:]
    heads = width // dim - 2 * kv_heads
    assert qkv.is_contiguous(), "rows lie one after another"
    assert table.is_contiguous(), "so do positions"
    assert table.dtype == torch.float32, "turned in fp32"
    assert layer.stride()[3:] == (dim, 1), "a head's keys in a block lie one after another"
    assert dim % 2 == 0, "numbers turn in pairs"
    query = torch.empty((count, heads, dim), dtype=qkv.dtype, device=qkv.device)
    _turn_and_write[count, triton.cdiv(heads + 2 * kv_heads, _HEADS)](
        qkv,
        layer,
        rows.positions,
        rows.starts,
        rows.ids,
        table,
        query if norms is None else norms.query,
        query if norms is None else norms.key,
        query,
        0.0 if norms is None else norms.epsilon,
        *layer.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        TILE=_HEADS,
        DIM=dim,
        DIM_TILE=triton.next_power_of_2(dim),
        BLOCK=block_size,
        NORMED=norms is not None,
        num_warps=4,
    )
    return query


@triton.jit
def _turn_and_write(
    qkv: tl.pointer_type,
    layer: tl.pointer_type,
    positions: tl.pointer_type,
    starts: tl.pointer_type,
    ids: tl.pointer_type,
    table: tl.pointer_type,
    query_norm: tl.pointer_type,
    key_norm: tl.pointer_type,
    query: tl.pointer_type,
    epsilon: tl.tensor,
    block_stride: tl.tensor,
    kind_stride: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, DIM_TILE)
    inside = dims < DIM
    said = tl.load(positions + row)
    position = tl.maximum(said, 0)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    held = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]

    half = DIM // 2
    partner = tl.where(dims < half, dims + half, dims - half)
    places = qkv + (row * (HEADS + 2 * KV_HEADS) + head)[:, None] * DIM
    x = tl.load(places + dims[None, :], mask=held, other=0.0)
    mine = x.to(tl.float32)
    other = tl.load(places + partner[None, :], mask=held, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(mine * mine, 1) / DIM + epsilon)[:, None]
        of_mine = _chosen(is_query, query_norm, key_norm, dims, inside)
        of_other = _chosen(is_query, query_norm, key_norm, partner, inside)
        kind = query_norm.dtype.element_ty
        mine = ((mine * scale).to(kind).to(tl.float32) * of_mine).to(x.dtype).to(tl.float32)
        other = ((other * scale).to(kind).to(tl.float32) * of_other).to(x.dtype).to(tl.float32)
    turn = table + position.to(tl.int64) * (2 * DIM) + dims
    cosine = tl.load(turn, mask=inside, other=0.0)
    sine = tl.load(turn + DIM, mask=inside, other=0.0)
    turned = mine * cosine[None, :] + tl.where(dims < half, -sine, sine)[None, :] * other
    result = tl.where(is_value[:, None], x.to(tl.float32), turned)

    to_query = query + (row * HEADS + head)[:, None] * DIM + dims[None, :]
    tl.store(to_query, result.to(query.dtype.element_ty), mask=held & is_query[:, None])
    block = tl.load(ids + tl.load(starts + row) + position // BLOCK).to(tl.int64)
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    to_cache = block * block_stride + (position % BLOCK) * DIM + kv_head * head_stride
    to_cache += tl.where(is_value, kind_stride, 0)
    # A row that pads has nothing to write.
    written = tl.where(head >= HEADS, said, -1) >= 0
    narrow = narrowed(result, layer.dtype.element_ty)
    tl.store(layer + to_cache[:, None] + dims[None, :], narrow, mask=held & written[:, None])


@triton.jit
def _chosen(
    is_query: tl.tensor, query_norm: tl.pointer_type, key_norm: tl.pointer_type, dims: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Each head's norm: [heads, dims]"""
    of_query = tl.load(query_norm + dims, mask=inside, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + dims, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])
