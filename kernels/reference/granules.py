"""KV on its way between two layouts: granules of 16 tokens, in the numbers of the wire.

A packed granule is [scales] [layers, 2, heads, 16, head_dim]: scales [layers, 2, heads, 16] bf16
only where the wire quantises. It says nothing of block sizes, of the cache's numbers or of other
heads, so what one layout packs any other can unpack.

What is quantised is turned first, by a Hadamard matrix over head_dim (QuaRot, Ashkboos et al. 2024):
keys have a few loud channels, and turned they share their loudness with the others.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kernels.reference.fp8 import FP8, LARGEST, moved, narrowed

Wire: TypeAlias = Literal["bf16", "fp32", "fp8", "int8", "fp8_e4m3"]
"""fp8 is a cache's own numbers, fp8_e4m3 what the wire quantised."""
GRANULE: Final = 16
"""Tokens."""
_DTYPE: Final = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": FP8, "int8": torch.int8, "fp8_e4m3": FP8}
_SCALE_BYTES: Final = 2
_LARGEST: Final = {"int8": 127.0, "fp8_e4m3": LARGEST}
"""Of a quantised number."""


class Granules(NamedTuple):
    """Pieces of an arena: granule `parts[i]` of block `blocks[i]`."""

    blocks: Tensor
    """[count] int64."""
    parts: Tensor
    """[count] int64, below block_size / 16."""


def granule_bytes(layers: int, heads: int, head_dim: int, wire: Wire) -> int:
    """Of one packed granule."""
    rows = layers * 2 * heads * GRANULE
    return rows * ((_SCALE_BYTES if wire in _LARGEST else 0) + head_dim * _DTYPE[wire].itemsize)


def is_whole(arena: Tensor, heads: slice, wire: Wire) -> bool:
    """Whether a granule is a block of the arena as it lies."""
    all_heads = heads.stop - heads.start == arena.shape[3]
    return arena.shape[4] == GRANULE and all_heads and wire not in _LARGEST and arena.dtype == _DTYPE[wire]


def pack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, out: Tensor | None = None) -> Tensor:
    """arena: [blocks, layers, 2, heads, block_size, head_dim] → [count * granule_bytes] uint8.

    `heads` counts from the arena's first. `out`, of that size, is where the result may lie.
    """
    del out
    if is_whole(arena, heads, wire):
        return moved(arena).index_select(0, granules.blocks).view(-1).view(torch.uint8)
    # Indices apart from each other come first in the result: [count, layers, 2, heads, 16, head_dim].
    chosen = _parted(arena)[granules.blocks, :, :, heads, granules.parts].view(arena.dtype)
    if wire not in _LARGEST:
        return _as(chosen, _DTYPE[wire]).contiguous().view(-1).view(torch.uint8)
    numbers, scales = _quantise(chosen.float(), wire)
    count = len(granules.blocks)
    as_bytes = (scales.contiguous().view(count, -1).view(torch.uint8), numbers.reshape(count, -1).view(torch.uint8))
    return torch.cat(as_bytes, dim=1).view(-1)


def unpack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, packed: Tensor) -> None:
    """The inverse of `pack_granules`, into an arena of any block size and numbers."""
    if is_whole(arena, heads, wire):
        blocks = moved(packed.view(arena.dtype)).view(-1, *arena.shape[1:])
        moved(arena).index_copy_(0, granules.blocks, blocks)
        return
    count, layers, head_dim = len(granules.blocks), arena.shape[1], arena.shape[5]
    shape = (count, layers, 2, heads.stop - heads.start, GRANULE, head_dim)
    if wire not in _LARGEST:
        values = packed.view(_DTYPE[wire]).view(shape)
    else:
        rows = packed.view(count, -1)
        size = layers * 2 * shape[3] * GRANULE * _SCALE_BYTES
        scales = rows[:, :size].contiguous().view(torch.bfloat16).view(*shape[:5], 1)
        values = rows[:, size:].contiguous().view(_DTYPE[wire]).view(shape).float() * scales
        values = values @ _turn(head_dim, packed.device).mT
    _parted(arena)[granules.blocks, :, :, heads, granules.parts] = moved(_as(values, arena.dtype))


def _parted(arena: Tensor) -> Tensor:
    """[blocks, layers, 2, heads, parts, 16, head_dim], the same memory, fp8 as bytes."""
    return moved(arena).view(*arena.shape[:4], -1, GRANULE, arena.shape[5])


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What is in these numbers already stays as it is, to the bit."""
    return values if values.dtype == dtype else narrowed(values, dtype)


def _turn(head_dim: int, device: torch.device) -> Tensor:
    """Orthogonal [head_dim, head_dim]: Hadamard matrices of the largest power of two that divides it, side by side."""
    size = head_dim & -head_dim
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.kron(torch.eye(head_dim // size), matrix / size**0.5).to(device)


def _quantise(values: Tensor, wire: Wire) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale for each token of a head: (numbers, scales [count, layers, 2, heads, 16] bf16).

    8 bits have no NaN. A token that isn't finite has a scale that isn't, so that it is none when it is unpacked and its
    sequence fails, as it would have where it was computed.
    """
    largest = _LARGEST[wire]
    turned = values @ _turn(values.shape[-1], values.device)
    scales = (turned.abs().amax(dim=-1) / largest).to(torch.bfloat16)
    scales[scales == 0] = 1.0  # a token of zeros has no scale of its own
    scaled = turned / scales[..., None]
    if wire == "int8":
        scaled = scaled.round_()
    return scaled.clamp_(-largest, largest).to(_DTYPE[wire]), scales
