"""Normalisation, rotary positions and the gate: one row in, one row out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x: [..., size]  weight: [size]. Computed in fp32, as the models were trained."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


def rope_table(positions: int, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of every position: [positions, 2, head_dim] in fp32 (RoFormer, Su 2021)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(positions).float(), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """x: [tokens, heads, head_dim]  table: [tokens, 2, head_dim] rows of `rope_table`, x's dtype."""
    cosine, sine = table.unsqueeze(2).unbind(1)
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020)."""
    return functional.silu(gate) * up
