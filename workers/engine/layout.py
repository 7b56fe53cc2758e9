"""Where weights lie in one piece of memory: one after another, in the order they are declared."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

STACKED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Weights (and biases) of one product: they share its input."""
_PARTS = frozenset(part for parts in STACKED for part in parts)


def is_stacked(name: str) -> bool:
    """Whether it is a part of a larger product."""
    return ".".join(name.split(".")[-3:-1]) in _PARTS


def laid_out(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, flat: Tensor | None = None
) -> dict[str, Tensor]:
    """Tensors of these names and shapes in `flat`, or in fresh memory that nobody has written to."""
    flat = torch.empty(sum(math.prod(shape) for shape in shapes.values()), dtype=dtype) if flat is None else flat
    tensors: dict[str, Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        tensors[name] = flat[at : at + size].view(shape)
        at += size
    assert at == len(flat), "the memory is exactly what the weights need"
    return tensors
