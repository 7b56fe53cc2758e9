"""Packing and unpacking KV, by the device that it lies on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.cpu import granules as cpu
from kernels.reference import granules as reference
from kernels.reference.granules import Granules, Wire

if TYPE_CHECKING:
    from torch import Tensor


def pack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, out: Tensor | None = None) -> Tensor:
    """arena: [blocks, layers, 2, heads, block_size, head_dim] → [count * granule_bytes] uint8.

    `heads` counts from the arena's first. `out`, of that size, is where the result may lie.
    """
    on = cpu if arena.device.type == "cpu" else reference
    return on.pack_granules(arena, granules, heads, wire, out)


def unpack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, packed: Tensor) -> None:
    """The inverse of `pack_granules`, into an arena of any block size and numbers."""
    on = cpu if arena.device.type == "cpu" else reference
    on.unpack_granules(arena, granules, heads, wire, packed)
