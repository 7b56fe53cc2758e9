"""The gate of an MLP: half of a product's columns decide what passes of the other half."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

Gate: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]
_TILE = 1024


def gated(gate_up: Tensor, gate: Gate) -> Tensor:
    """gate_up: [rows, 2 * size], the gate's columns first → [rows, size]"""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous(), "rows lie one after another"
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _gated[rows, triton.cdiv(size, _TILE)](gate_up, out, size, TILE=_TILE, GATE=gate, num_warps=4)
    return out


@triton.jit
def _gated(
    gate_up: tl.pointer_type, out: tl.pointer_type, size: tl.tensor, TILE: tl.constexpr, GATE: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=held, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=held, other=0.0).to(tl.float32)
    if GATE == "silu":
        opened = gate * tl.sigmoid(gate)
    elif GATE == "gelu":
        opened = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        opened = gate * tl.sigmoid(2.0 * inner)
    kind = out.dtype.element_ty
    # The reference rounds in between.
    tl.store(out + row * size + columns, (opened.to(kind).to(tl.float32) * up).to(kind), mask=held)
