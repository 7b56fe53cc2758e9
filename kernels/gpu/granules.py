"""Granules as `kernels.reference.granules` has them, each packed or unpacked in one pass.

What is quantised is turned on tensor cores: the numbers are bf16 as they lie, or 8 bits wide, and a
Hadamard matrix without its factor is all ±1, so products in bf16 are exact and only their fp32 sums
round. An fp32 cache is turned in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.fp8 import narrowed
from kernels.gpu.paged import dot_precision, tile_of
from kernels.reference.fp8 import FP8, LARGEST
from kernels.reference.granules import GRANULE, Granules, Wire, granule_bytes, is_whole

_NUMBERS: Final = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": FP8, "int8": torch.int8, "fp8_e4m3": FP8}
_LARGEST: Final = {"int8": 127.0, "fp8_e4m3": LARGEST}
_COPIED = 4096
"""Words of 4 bytes that a program copies."""


def pack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, out: Tensor | None = None) -> Tensor:
    """arena: [blocks, layers, 2, heads, block_size, head_dim] → [count * granule_bytes] uint8.

    `heads` counts from the arena's first. `out`, of that size, is where the result may lie.
    """
    count, layers, dim = len(granules.blocks), arena.shape[1], arena.shape[5]
    nbytes = count * granule_bytes(layers, heads.stop - heads.start, dim, wire)
    if out is None or out.numel() != nbytes or out.data_ptr() % 16 or out.device != arena.device:
        out = torch.empty(nbytes, dtype=torch.uint8, device=arena.device)
    if is_whole(arena, heads, wire):
        _copy(arena, granules.blocks, out, packing=True)
    else:
        _launch(arena, granules, heads, wire, out, packing=True)
    return out


def unpack_granules(arena: Tensor, granules: Granules, heads: slice, wire: Wire, packed: Tensor) -> None:
    """The inverse of `pack_granules`, into an arena of any block size and numbers."""
    if packed.data_ptr() % 16:
        packed = packed.clone()
    if is_whole(arena, heads, wire):
        _copy(arena, granules.blocks, packed, packing=False)
    else:
        _launch(arena, granules, heads, wire, packed, packing=False)


def _copy(arena: Tensor, blocks: Tensor, packed: Tensor, *, packing: bool) -> None:
    """Whole blocks, as they lie."""
    assert arena.is_contiguous(), "a block is one piece"
    words = arena[0].numel() * arena.element_size() // 4
    if len(blocks):
        _copy_blocks[len(blocks), triton.cdiv(words, _COPIED)](
            arena.view(torch.int32),
            packed.view(torch.int32),
            blocks,
            WORDS=words,
            TILE=_COPIED,
            PACKING=packing,
            num_warps=8,
        )


def _launch(arena: Tensor, granules: Granules, heads: slice, wire: Wire, packed: Tensor, *, packing: bool) -> None:
    count, layers, dim = len(granules.blocks), arena.shape[1], arena.shape[5]
    taken = heads.stop - heads.start
    assert arena.is_contiguous(), "places are counted from the arena's first number"
    if not count:
        return
    quantised = wire in _LARGEST
    exact = torch.float32 if arena.dtype == torch.float32 else torch.bfloat16
    numbers = _NUMBERS[wire]
    if wire == "fp8" and arena.dtype == FP8:  # bytes, NaN as it is, on GPUs that know no fp8 as well
        arena, numbers = arena.view(torch.uint8), torch.uint8
    _convert[count, layers * 2, taken](
        arena,
        granules.blocks,
        granules.parts,
        packed.view(numbers),
        packed.view(torch.bfloat16),
        _signs(dim, exact, arena.device) if quantised else arena,
        HEADS=arena.shape[3],
        FIRST_HEAD=heads.start,
        BLOCK=arena.shape[4],
        DIM=dim,
        DIM_TILE=tile_of(dim),
        TOKENS=GRANULE,
        GRANULE_BYTES=granule_bytes(layers, taken, dim, wire),
        LARGEST=_LARGEST.get(wire, 0.0),
        SHRINK=(dim & -dim) ** -0.5,
        ROUNDS=wire == "int8",
        PACKING=packing,
        PRECISION=dot_precision(exact),
        num_warps=4 if exact == torch.bfloat16 else 8,
    )


@cache
def _signs(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[head_dim, head_dim]: Hadamard matrices side by side, without the factor that makes them orthogonal."""
    size = head_dim & -head_dim
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.kron(torch.eye(head_dim // size), matrix).to(device=device, dtype=dtype)


@triton.jit
def _copy_blocks(
    arena: tl.pointer_type,
    packed: tl.pointer_type,
    blocks: tl.pointer_type,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    PACKING: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    there = arena + tl.load(blocks + index) * WORDS
    here = packed + index * WORDS
    words = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = words < WORDS
    if PACKING:
        tl.store(here + words, tl.load(there + words, mask=held), mask=held)
    else:
        tl.store(there + words, tl.load(here + words, mask=held), mask=held)


@triton.jit
def _convert(
    arena: tl.pointer_type,
    blocks: tl.pointer_type,
    parts: tl.pointer_type,
    numbers: tl.pointer_type,
    scales: tl.pointer_type,
    signs: tl.pointer_type,
    HEADS: tl.constexpr,
    FIRST_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    GRANULE_BYTES: tl.constexpr,
    LARGEST: tl.constexpr,
    SHRINK: tl.constexpr,
    ROUNDS: tl.constexpr,
    PACKING: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One head's 16 tokens, keys or values, of one layer."""
    index = tl.program_id(0).to(tl.int64)
    sheet = tl.program_id(1)
    head = tl.program_id(2)
    sheets, heads = tl.num_programs(1), tl.num_programs(2)
    token = tl.arange(0, TOKENS)
    dims = tl.arange(0, DIM_TILE)
    held = (token >= 0)[:, None] & (dims < DIM)[None, :]

    of_block = (tl.load(blocks + index) * sheets + sheet) * HEADS + FIRST_HEAD + head
    first = of_block * BLOCK + tl.load(parts + index) * TOKENS
    there = arena + (first + token)[:, None] * DIM + dims[None, :]
    row = (sheet * heads + head) * TOKENS + token
    here = numbers + row[:, None] * DIM + dims[None, :]
    kind = numbers.dtype.element_ty
    if LARGEST == 0.0:
        here += index * (GRANULE_BYTES // (kind.primitive_bitwidth // 8))
        if PACKING:
            tl.store(here, _as(tl.load(there, mask=held), kind), mask=held)
        else:
            tl.store(there, _as(tl.load(here, mask=held), arena.dtype.element_ty), mask=held)
    else:
        # Scales first: 2 bytes for each row of one-byte numbers.
        here += index * GRANULE_BYTES + sheets * heads * TOKENS * 2
        scale_at = scales + index * (GRANULE_BYTES // 2) + row
        inside = (dims < DIM)[:, None] & (dims < DIM)[None, :]
        matrix = tl.load(signs + dims[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        if PACKING:
            values = tl.load(there, mask=held, other=0.0).to(matrix.dtype)
            turned = tl.dot(values, matrix, input_precision=PRECISION) * SHRINK
            scale = (tl.max(tl.abs(turned), 1) / LARGEST).to(tl.bfloat16)
            # A token of zeros has no scale of its own.
            scale = tl.where(scale.to(tl.float32) == 0.0, 1.0, scale.to(tl.float32))
            tl.store(scale_at, scale.to(tl.bfloat16))
            scaled = turned / scale[:, None]
            if ROUNDS:
                # To the nearest, ties to even: an fp32 of this size has no room for fractions.
                scaled = (scaled + 12582912.0) - 12582912.0
            scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
            tl.store(here, scaled.to(kind), mask=held)
        else:
            found = tl.load(here, mask=held, other=0.0).to(tl.float32).to(matrix.dtype)
            scale = tl.load(scale_at).to(tl.float32)
            values = tl.dot(found, tl.trans(matrix), input_precision=PRECISION) * (scale * SHRINK)[:, None]
            tl.store(there, narrowed(values, arena.dtype.element_ty), mask=held)


@triton.jit
def _as(numbers: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """What is in these numbers already stays as it is, to the bit."""
    if numbers.dtype == KIND:
        return numbers
    else:
        return narrowed(numbers, KIND)
