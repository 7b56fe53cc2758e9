"""KV on its way between tokens, blocks and buffers: every byte in its place and no other touched."""

from __future__ import annotations

import pytest
import torch

from kernels import pack_blocks, unpack_blocks, write_kv

LAYERS, HEADS, BLOCK, DIM = 3, 2, 16, 8


def arena(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(10, LAYERS, 2, HEADS, BLOCK, DIM).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_out_of_a_buffer_as_they_went_in(dtype: torch.dtype) -> None:
    source, target = arena(dtype), arena(dtype)
    untouched = target.clone()
    packed = pack_blocks(source, torch.tensor([7, 0, 3]))
    assert (packed.dtype, packed.shape) == (torch.uint8, (3 * source[0].nbytes,))
    unpack_blocks(target, torch.tensor([1, 9, 4]), packed)
    for there, here in ((7, 1), (0, 9), (3, 4)):
        assert torch.equal(target[here], source[there])
    for block in (0, 2, 3, 5, 6, 7, 8):
        assert torch.equal(target[block], untouched[block])


def test_a_block_is_one_contiguous_piece_of_the_buffer() -> None:
    source = arena()
    whole = pack_blocks(source, torch.tensor([2, 5]))
    assert torch.equal(whole[: source[0].nbytes], pack_blocks(source, torch.tensor([2])))
    assert bytes(whole[source[0].nbytes :].tolist()) == source[5].numpy().tobytes()


def test_packing_takes_a_copy() -> None:
    source = arena()
    packed = pack_blocks(source, torch.tensor([1]))
    before = packed.clone()
    source[1].zero_()
    assert torch.equal(packed, before)


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
