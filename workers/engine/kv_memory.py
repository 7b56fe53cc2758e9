"""An engine's KV memory: the arena, and how often each of its blocks was taken for new content. Knows no owner."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.types import BlockId, KvDtype, KvLayout, KvSource
from kernels import GRANULE, Granules, pack_granules

TORCH_DTYPE: dict[KvDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True, eq=False)
class KvMemory:
    """arena: [blocks, layers, 2, heads, block_size, head_dim], finite everywhere: masked positions are read.
    generations: [blocks]."""

    arena: Tensor
    generations: MutableSequence[int]


def private_memory(layout: KvLayout, blocks: int, device: torch.device) -> KvMemory:
    """Nobody else can read it. Its pages come on first use."""
    arena = torch.zeros((blocks, *layout.block_shape), dtype=TORCH_DTYPE[layout.dtype], device=device)
    return KvMemory(arena, [0] * blocks)


def locate_granules(arena: Tensor, blocks: Sequence[BlockId], first: int, count: int) -> Granules:
    """Granules [first, first + count), counted from the first of `blocks`."""
    per_block, last = arena.shape[4] // GRANULE, first + count
    if per_block == 1:
        ids, parts = torch.tensor(blocks[first:last], dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    else:
        at = range(first, last)
        ids = torch.tensor([blocks[each // per_block] for each in at], dtype=torch.int64)
        parts = torch.tensor([each % per_block for each in at], dtype=torch.int64)
    return Granules(ids.to(arena.device), parts.to(arena.device))


def read_granules(arena: Tensor, source: KvSource, count: int, out: Tensor | None = None) -> Tensor:
    """What `source` means, packed for its wire: [bytes] uint8 on the arena's device, in `out` if it can be."""
    granules = locate_granules(arena, source.blocks, source.skip, count)
    heads = slice(source.first_head, source.first_head + source.heads)
    return pack_granules(arena, granules, heads, source.wire, out)
