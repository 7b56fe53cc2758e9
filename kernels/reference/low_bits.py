"""Matrices in 8 bits: a scale for each row, as `kernels.gpu.low_bits` has, or for each 32 of it, as `kernels.cpu`."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

Bits: TypeAlias = Literal["int8", "fp8"]
_LARGEST: Final = {"int8": 127.0, "fp8": 448.0}
_NUMBERS: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def narrow_rows(x: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """x: [rows, columns] → 8-bit numbers of that shape and scales [rows] fp32; their product is x, nearly.

    A row that isn't finite has a scale that isn't: it means nothing, and whoever multiplies by it sees that.
    """
    scales = x.float().abs().amax(-1) / _LARGEST[bits]
    scales[scales == 0] = 1.0
    scaled = x.float() / scales[:, None]
    if bits == "int8":
        scaled = scaled.round_()
    return scaled.clamp_(-_LARGEST[bits], _LARGEST[bits]).to(_NUMBERS[bits]), scales


def narrow_linear(x: Tensor, weight: Tensor, bits: Bits, bias: Tensor | None = None) -> Tensor:
    """x: [rows, in]  weight: [out, in]  bias: [out]  → [rows, out], both sides rounded to 8 bits."""
    (left, of_rows), (right, of_columns) = narrow_rows(x, bits), narrow_rows(weight, bits)
    product = (left.double() @ right.double().T).float() * of_rows[:, None] * of_columns
    return (product if bias is None else product + bias.float()).to(x.dtype)


GROUP: Final = 32
"""Numbers of a row that share a scale, as in llama.cpp's formats."""
_LEAST_SCALED: Final = 1e-30
"""What is smaller counts as 0."""


def narrow_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [rows, columns] → whole numbers of that shape, -127 to 127, and scales [rows, columns / 32], both fp32.

    Where a group has a number that is not finite, its scale is NaN.
    """
    groups: Tensor = x.float().reshape(*x.shape[:-1], -1, GROUP)
    most = groups.abs().amax(-1)
    counts = (most >= _LEAST_SCALED) & most.isfinite()
    # Two tensors: torch multiplies by the reciprocal where one is a number, and ties then fall the other way.
    inverse = torch.where(counts, torch.full_like(most, 127.0) / most, 0.0)
    numbers = torch.nan_to_num((groups * inverse[..., None]).round(), nan=0.0)
    scales = torch.where(counts, most / 127.0, torch.where(most.isfinite(), 0.0, torch.nan))
    return numbers.flatten(-2), scales


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: [rows, in], rounded as `narrow_groups` does  weight: [out, in], as it is  → [rows, out] fp32."""
    numbers, scales = narrow_groups(x)
    rounded = numbers.double() * scales.double().repeat_interleave(GROUP, -1)
    return (rounded @ weight.double().T).float()
