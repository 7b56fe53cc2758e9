"""Normalisation, rotary positions and the gate: one row in, one row out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x: [..., size]  weight: [size]. Computed in fp32, as the models were trained.

    The product with the weight is taken in the weight's precision: some were trained with it in
    fp32, some in their own.
    """
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * scaled.to(weight.dtype)).to(x.dtype)


def rope_table(positions: int, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of every position: [positions, 2, head_dim] in fp32 (RoFormer, Su 2021)."""
    return turn_table(rope_frequencies(head_dim, theta), positions)


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """How far each pair turns from one position to the next, in radians: [head_dim / 2] in fp32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def turn_table(frequencies: Tensor, positions: int, scale: float = 1.0) -> Tensor:
    """Cosines and sines, times `scale`: [positions, 2, head_dim] in fp32.

    frequencies: [head_dim / 2], or [positions, head_dim / 2] where each position has its own
    """
    angles = (torch.arange(positions).float()[:, None] * frequencies).repeat(1, 2)
    return torch.stack((angles.cos() * scale, angles.sin() * scale), dim=1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim]  table: [tokens, 2, head_dim] rows of `rope_table`, x's dtype."""
    cosine, sine = table.unsqueeze(2).unbind(1)
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020)."""
    return functional.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, elementwise."""
    # Contiguous or not, a CPU runs other code; a single row always is.
    return functional.gelu(gate.contiguous()) * up


def tanh_geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's approximation by a tanh, elementwise."""
    return functional.gelu(gate, approximate="tanh") * up


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Squeeze x into (-cap, cap), elementwise."""
    return torch.tanh(x / cap) * cap
