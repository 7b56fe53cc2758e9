"""Moving KV from tokens to blocks. Knows ids, not who owns them.

The arena is [blocks, layers, 2, kv_heads, block_size, head_dim]: a block is one contiguous piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.reference.fp8 import moved, narrowed

if TYPE_CHECKING:
    from torch import Tensor


def write_kv(layer: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, offsets: Tensor) -> None:
    """Put each token's keys and values where its block table says, in the cache's numbers.

    layer: [blocks, 2, kv_heads, block_size, head_dim], one layer of the arena
    keys, values: [tokens, kv_heads, head_dim]  blocks, offsets: [tokens]
    """
    numbers = moved(layer)
    numbers[blocks, 0, :, offsets] = moved(narrowed(keys, layer.dtype))
    numbers[blocks, 1, :, offsets] = moved(narrowed(values, layer.dtype))
