"""A matrix in 8 bits, one scale a row: what `kernels.gpu.low_bits` means."""

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
