"""Products in 8 bits: rows quantised as they come (W8A8), one scale a row and one a weight's column.

The products are torch's: `_int_mm` (int8, CUDA and CPU) and `_scaled_mm` (fp8 e4m3, from compute
capability 8.9 on, row-wise scales from 9.0 on). What is around them is one pass each.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

Bits: TypeAlias = Literal["int8", "fp8"]
_NUMBERS: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST: Final = {"int8": 127.0, "fp8": 448.0}
_LEAST_ROWS: Final = 32
"""`_int_mm` takes no fewer than 17."""
_TILE = 1024


class Narrow(NamedTuple):
    """A matrix in 8 bits. numbers: [rows, columns], scales: [rows] fp32; numbers * scales is what it means."""

    numbers: Tensor
    scales: Tensor


def can_multiply(weight: Tensor) -> bool:
    """Whether torch's products take a weight of this shape: [out, in]"""
    return all(size % 16 == 0 for size in weight.shape)


def narrow_rows(x: Tensor, bits: Bits, least_rows: int = 0) -> Narrow:
    """x: [rows, columns]; zeros are added up to `least_rows` rows. A row that isn't finite has a scale that isn't."""
    rows, columns = x.shape
    assert x.is_contiguous(), "rows lie one after another"
    padded = max(rows, least_rows)
    numbers = torch.empty((padded, columns), dtype=_NUMBERS[bits], device=x.device)
    scales = torch.empty(padded, dtype=torch.float32, device=x.device)
    if padded:
        _narrow[(padded,)](
            x,
            numbers,
            scales,
            rows,
            COLUMNS=columns,
            TILE=_TILE,
            LARGEST=_LARGEST[bits],
            ROUNDS=bits == "int8",
            num_warps=4,
        )
    return Narrow(numbers, scales)


def linear(x: Tensor, weight: Narrow, bias: Tensor | None = None) -> Tensor:
    """x: [rows, in]  weight: [out, in]  bias: [out]  → [rows, out], of x's type."""
    rows = len(x)
    if weight.numbers.dtype == torch.float8_e4m3fn:
        narrow = narrow_rows(x, "fp8")
        product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
            narrow.numbers,
            weight.numbers.t(),
            scale_a=narrow.scales[:, None],
            scale_b=weight.scales[None, :],
            out_dtype=torch.bfloat16,
        ).to(x.dtype)
        return product if bias is None else product + bias
    narrow = narrow_rows(x, "int8", _LEAST_ROWS)
    sums = torch._int_mm(narrow.numbers, weight.numbers.t())  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    out = torch.empty((rows, len(weight.numbers)), dtype=x.dtype, device=x.device)
    if rows:
        _widen[rows, triton.cdiv(out.shape[1], _TILE)](
            sums,
            narrow.scales,
            weight.scales,
            weight.scales if bias is None else bias,
            out,
            out.shape[1],
            TILE=_TILE,
            BIASED=bias is not None,
            num_warps=4,
        )
    return out


@triton.jit
def _narrow(
    x: tl.pointer_type,
    numbers: tl.pointer_type,
    scales: tl.pointer_type,
    rows: tl.tensor,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    # A row that was added holds nothing to read.
    size = tl.where(row < rows, COLUMNS, 0)
    largest = tl.zeros([TILE], tl.float32)
    broken = tl.zeros([TILE], tl.int32)
    for first in range(0, COLUMNS, TILE):
        columns = first + tl.arange(0, TILE)
        values = tl.load(x + row * COLUMNS + columns, mask=columns < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        broken = tl.maximum(broken, (values != values).to(tl.int32))
    scale = tl.max(largest, 0) / LARGEST
    # A maximum skips NaN, and 8 bits have none: without this it would become a number, and pass for an answer.
    scale = tl.where(tl.max(broken, 0) > 0, float("nan"), scale)
    # A row of zeros has no scale of its own.
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scales + row, scale)
    for first in range(0, COLUMNS, TILE):
        columns = first + tl.arange(0, TILE)
        values = tl.load(x + row * COLUMNS + columns, mask=columns < size, other=0.0).to(tl.float32) / scale
        if ROUNDS:
            # To the nearest, ties to even: an fp32 of this size has no room for fractions.
            values = (values + 12582912.0) - 12582912.0
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
        tl.store(numbers + row * COLUMNS + columns, values.to(numbers.dtype.element_ty), mask=columns < COLUMNS)


@triton.jit
def _widen(
    sums: tl.pointer_type,
    row_scales: tl.pointer_type,
    column_scales: tl.pointer_type,
    bias: tl.pointer_type,
    out: tl.pointer_type,
    size: tl.tensor,
    TILE: tl.constexpr,
    BIASED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = columns < size
    wide = tl.load(sums + row * size + columns, mask=held, other=0).to(tl.float32)
    wide = wide * tl.load(row_scales + row) * tl.load(column_scales + columns, mask=held, other=0.0)
    if BIASED:
        wide += tl.load(bias + columns, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, wide.to(out.dtype.element_ty), mask=held)
