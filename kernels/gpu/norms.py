"""Residual sum and RMS norm in one pass over a row. Same roundings as `kernels.reference.elementwise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.paged import tile_of


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x: [rows, size]  weight: [size]"""
    normed = torch.empty_like(x)
    _launch(x, None, None, weight, epsilon, x, normed)
    return normed


def add_rms_norm(
    hidden: Tensor, delta: Tensor, weight: Tensor, epsilon: float, end_norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden + delta, and the norm of that: both [rows, size], new.

    end_norm: [size], the norm that `delta` passes first, in models that have one
    """
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    _launch(hidden, delta, end_norm, weight, epsilon, total, normed)
    return total, normed


def _launch(
    hidden: Tensor,
    delta: Tensor | None,
    end_norm: Tensor | None,
    weight: Tensor,
    epsilon: float,
    total: Tensor,
    normed: Tensor,
) -> None:
    rows, size = hidden.shape
    assert hidden.is_contiguous(), "rows lie one after another"
    assert delta is None or delta.is_contiguous(), "rows lie one after another"
    if not rows:
        return
    tile = tile_of(size)
    _add_rms_norm[(rows,)](
        hidden,
        hidden if delta is None else delta,
        weight if end_norm is None else end_norm,
        weight,
        total,
        normed,
        epsilon,
        SIZE=size,
        TILE=tile,
        ADDS=delta is not None,
        ENDS=end_norm is not None,
        num_warps=min(16, max(1, tile // 512)),
    )


@triton.jit
def _add_rms_norm(
    hidden: tl.pointer_type,
    delta: tl.pointer_type,
    end_norm: tl.pointer_type,
    weight: tl.pointer_type,
    total: tl.pointer_type,
    normed: tl.pointer_type,
    epsilon: tl.tensor,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ADDS: tl.constexpr,
    ENDS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, TILE)
    held = columns < SIZE
    x = tl.load(hidden + row + columns, mask=held, other=0.0)
    if ADDS:
        more = tl.load(delta + row + columns, mask=held, other=0.0)
        if ENDS:
            end = tl.load(end_norm + columns, mask=held, other=0.0)
            more = _normed(more, end, epsilon, SIZE)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(total + row + columns, x, mask=held)
    tl.store(normed + row + columns, _normed(x, tl.load(weight + columns, mask=held, other=0.0), epsilon, SIZE), held)


@triton.jit
def _normed(x: tl.tensor, weight: tl.tensor, epsilon: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """In fp32, but rounded to the weight's type before they are multiplied."""
    wide = x.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)
    return (weight.to(tl.float32) * scaled.to(weight.dtype).to(tl.float32)).to(x.dtype)
