"""Packing and unpacking KV, by the device that it lies on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.cpu import granules as cpu
from kernels.gpu.availability import reason_against
from kernels.reference import granules as reference
from kernels.reference.granules import Granules, Wire

if TYPE_CHECKING:
    from torch import Tensor


def pack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, out: Tensor | None = None) -> Tensor:
    """arena: [blocks, layers, 2, heads, block_size, head_dim] → [count * granule_bytes] uint8.

    `heads` counts from the arena's first. `out`, of that size, is where the result may lie.
    """
    if arena.device.type == "cpu":
        return cpu.pack_granules(arena, granules, heads, wire, out)
    if reason_against(arena.device):
        return reference.pack_granules(arena, granules, heads, wire, out)
    from kernels.gpu import granules as gpu  # Triton takes a second to load

    return gpu.pack_granules(arena, granules, heads, wire, out)


def unpack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, packed: Tensor) -> None:
    """The inverse of `pack_granules`, into an arena of any block size and numbers."""
    if arena.device.type == "cpu":
        cpu.unpack_granules(arena, granules, heads, wire, packed)
    elif reason_against(arena.device):
        reference.unpack_granules(arena, granules, heads, wire, packed)
    else:
        from kernels.gpu import granules as gpu

        gpu.unpack_granules(arena, granules, heads, wire, packed)
