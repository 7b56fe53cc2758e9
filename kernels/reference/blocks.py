"""Moving KV between tokens, blocks and packed buffers. Knows ids, not who owns them.

The arena is [blocks, layers, 2, kv_heads, block_size, head_dim]: a block is one contiguous piece.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_kv(layer: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Put each token's keys and values where its block table says.

    layer: [blocks, 2, kv_heads, block_size, head_dim], one layer of the arena
    keys, values: [tokens, kv_heads, head_dim]  blocks, offsets: [tokens]
    """
    layer[blocks, 0, :, offsets] = keys
    layer[blocks, 1, :, offsets] = values


def pack_blocks(arena: Tensor, blocks: Tensor) -> Tensor:
    """The named blocks as one contiguous buffer of bytes: [count * block_bytes] uint8."""
    return arena.index_select(0, blocks).view(-1).view(torch.uint8)


def unpack_blocks(arena: Tensor, blocks: Tensor, packed: Tensor) -> None:
    """The inverse of `pack_blocks`: `packed` [count * block_bytes] uint8 lands in `blocks`."""
    arena.index_copy_(0, blocks, packed.view(arena.dtype).view(-1, *arena.shape[1:]))
