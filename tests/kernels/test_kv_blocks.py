"""KV on its way from tokens to blocks: every value in its place and no other touched."""

from __future__ import annotations

import torch

from kernels import write_kv

LAYERS, HEADS, BLOCK, DIM = 3, 2, 16, 8


def test_each_tokens_keys_and_values_go_where_its_table_says() -> None:
    layer = torch.zeros(10, 2, HEADS, BLOCK, DIM)
    keys, values = torch.randn(4, HEADS, DIM), torch.randn(4, HEADS, DIM)
    blocks, offsets = torch.tensor([3, 3, 8, 0]), torch.tensor([14, 15, 0, 5])
    write_kv(layer, keys, values, blocks, offsets)
    expected = torch.zeros_like(layer)
    for token in range(4):
        expected[blocks[token], 0, :, offsets[token]] = keys[token]
        expected[blocks[token], 1, :, offsets[token]] = values[token]
    assert torch.equal(layer, expected)
    assert int((layer != 0).any(-1).sum()) == 4 * 2 * HEADS
