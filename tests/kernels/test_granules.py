"""KV between layouts: every value in its place, whatever the block sizes, numbers and shards of the two sides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kernels import GRANULE, Granules, granule_bytes, pack_granules, unpack_granules
from kernels.reference import granules as reference
from kernels.reference.fp8 import FP8, narrowed

LAYERS, HEADS, DIM = 3, 4, 8
TOKENS = 7 * GRANULE


def arena(block_size: int, dtype: torch.dtype = torch.float32, heads: int = HEADS) -> torch.Tensor:
    return torch.randn(12, LAYERS, 2, heads, block_size, DIM).to(dtype)


def granules(blocks: Sequence[int], block_size: int, count: int) -> Granules:
    """The first `count` of these blocks."""
    per_block = block_size // GRANULE
    at = torch.arange(count)
    return Granules(torch.tensor(blocks)[at // per_block], at % per_block)


def tokens_of(held: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """[layers, 2, heads, tokens, head_dim] of what these blocks hold, in order."""
    return torch.cat([held[block] for block in blocks], dim=3)[:, :, :, :TOKENS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("source_size", "target_size"), [(16, 16), (16, 32), (32, 16), (48, 16), (64, 32)])
def test_block_sizes_are_bridged_without_a_change(source_size: int, target_size: int, dtype: torch.dtype) -> None:
    source, target = arena(source_size, dtype), arena(target_size, dtype)
    untouched = target.clone()
    there = [7, 0, 3, 11, 2, 9, 1][: -(-TOKENS // source_size)]
    here = [1, 10, 4, 6, 8, 0, 5][: -(-TOKENS // target_size)]
    wire = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}[dtype]
    packed = pack_granules(source, granules(there, source_size, 7), slice(0, HEADS), wire)
    assert (packed.dtype, packed.shape) == (torch.uint8, (7 * granule_bytes(LAYERS, HEADS, DIM, wire),))
    unpack_granules(target, granules(here, target_size, 7), slice(0, HEADS), wire, packed)
    source, target, untouched = source.float(), target.float(), untouched.float()
    assert torch.equal(tokens_of(target, here), tokens_of(source, there))
    others = [block for block in range(12) if block not in here]
    assert torch.equal(target[others], untouched[others])
    tail = here[-1], slice(None), slice(None), slice(None), slice(TOKENS - (len(here) - 1) * target_size, None)
    assert torch.equal(target[tail], untouched[tail]), "what follows the last granule is nobody's business"


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_heads_come_together_from_two_shards_and_part_again(wire: str) -> None:
    whole, left, right = arena(16), arena(16, heads=2), arena(32, heads=2)
    at, at_right = granules([4, 2, 8], 16, 3), granules([5, 1], 32, 3)
    for shard, places, heads in ((left, at, slice(0, 2)), (right, at_right, slice(2, 4))):
        unpack_granules(shard, places, slice(0, 2), wire, pack_granules(whole, at, heads, wire))
    back = arena(16)
    for shard, places, heads in ((left, at, slice(0, 2)), (right, at_right, slice(2, 4))):
        unpack_granules(back, at, heads, wire, pack_granules(shard, places, slice(0, 2), wire))
    once = arena(16)
    unpack_granules(once, at, slice(0, HEADS), wire, pack_granules(whole, at, slice(0, HEADS), wire))
    torch.testing.assert_close(back[[4, 2, 8]], once[[4, 2, 8]], atol=0.03 if wire == "int8" else 0, rtol=0)


def test_fp32_becomes_bf16_by_rounding_once() -> None:
    source, target = arena(16), arena(32, torch.bfloat16)
    at, to = granules([3, 5], 16, 2), granules([7], 32, 2)
    unpack_granules(target, to, slice(0, HEADS), "bf16", pack_granules(source, at, slice(0, HEADS), "bf16"))
    assert torch.equal(target[7], torch.cat([source[3], source[5]], dim=3).to(torch.bfloat16))


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_cache_in_fp8_is_its_bytes_on_the_wire_nan_included(block_size: int) -> None:
    source = torch.randint(0, 256, (12, LAYERS, 2, HEADS, block_size, DIM), dtype=torch.uint8)
    target = torch.zeros_like(source)
    at, all_heads = granules([3, 5], block_size, 2), slice(0, HEADS)
    packed = pack_granules(source.view(FP8), at, all_heads, "fp8")
    assert len(packed) * 2 == 2 * granule_bytes(LAYERS, HEADS, DIM, "bf16")
    unpack_granules(target.view(FP8), at, all_heads, "fp8", packed)
    for block, part in zip(at.blocks.tolist(), at.parts.tolist(), strict=True):
        tokens = slice(part * GRANULE, (part + 1) * GRANULE)
        assert torch.equal(target[block, :, :, :, tokens], source[block, :, :, :, tokens])
    assert (target != 0).any(-1).sum() <= 2 * LAYERS * 2 * HEADS * GRANULE


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp8"])
def test_what_comes_into_a_cache_in_fp8_is_rounded_once_and_never_too_large(wire: str) -> None:
    source, target = arena(16), arena(32, FP8)
    source[3, 1, 0, 2, 7, 5], source[5, 1, 1, 2, 7, 5] = 1e4, -1e4
    at, to = granules([3, 5], 16, 2), granules([7], 32, 2)
    unpack_granules(target, to, slice(0, HEADS), wire, pack_granules(source, at, slice(0, HEADS), wire))
    sent = torch.cat([source[3], source[5]], dim=3).to(torch.bfloat16 if wire == "bf16" else torch.float32)
    assert torch.equal(target[7].float(), narrowed(sent, FP8).float())
    assert target[7].float().abs().max() == 448.0


@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
def test_a_quantised_wire_has_scales_whatever_the_cache_has(wire: str) -> None:
    source, target = arena(16, FP8), arena(16, FP8)
    at = granules([3, 5], 16, 2)
    packed = pack_granules(source, at, slice(0, HEADS), wire)
    assert len(packed) == 2 * granule_bytes(LAYERS, HEADS, DIM, wire)
    unpack_granules(target, at, slice(0, HEADS), wire, packed)
    torch.testing.assert_close(target[[3, 5]].float(), source[[3, 5]].float(), atol=0.5, rtol=0.2)


@pytest.mark.parametrize(("wire", "steps"), [("int8", 254), ("fp8_e4m3", 32)])
@pytest.mark.parametrize("dim", [8, 64, 80])
def test_quantised_tokens_are_off_by_half_a_step_at_most(wire: str, steps: float, dim: int) -> None:
    source = torch.randn(12, LAYERS, 2, HEADS, 16, dim)
    source[3, 1, 0, 2] *= 50  # one loud head must not cost the others their precision
    source[3, :, 0, :, :, 5] += 30  # nor one loud channel of the keys its own
    source[5, 2, 1, 3] = 0
    target = torch.zeros_like(source)
    at = granules([3, 5], 16, 2)
    packed = pack_granules(source, at, slice(0, HEADS), wire)
    assert len(packed) == 2 * granule_bytes(LAYERS, HEADS, dim, wire)
    unpack_granules(target, at, slice(0, HEADS), wire, packed)
    wanted, got = source[[3, 5]], target[[3, 5]]
    # Turned, no number is larger than the token's length, and the turn keeps lengths. A bf16 scale adds its rounding.
    bound = wanted.norm(dim=-1) * (dim**0.5 / steps + 2**-8)
    assert bool(((got - wanted).norm(dim=-1) <= bound).all())
    assert not got[1, 2, 1, 3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wire", ["bf16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("dim", [8, 80])
def test_what_is_not_finite_is_none_there_either_and_is_nobody_elses(wire: str, dim: int, bad: float) -> None:
    """It must fail its own sequence, and must not become a number on the way."""
    source = torch.randn(12, LAYERS, 2, HEADS, 16, dim)
    clean, target = torch.zeros_like(source), torch.zeros_like(source)
    at = granules([3, 5], 16, 2)
    unpack_granules(clean, at, slice(0, HEADS), wire, pack_granules(source, at, slice(0, HEADS), wire))
    source[3, 1, 0, 2, 7, 5] = bad
    unpack_granules(target, at, slice(0, HEADS), wire, pack_granules(source, at, slice(0, HEADS), wire))
    assert not torch.isfinite(target[3, 1, 0, 2, 7, 5])
    target[3, 1, 0, 2, 7] = clean[3, 1, 0, 2, 7]
    assert torch.equal(target, clean)


def test_int8_takes_little_more_than_half_of_bf16() -> None:
    assert granule_bytes(30, 3, 64, "int8") / granule_bytes(30, 3, 64, "bf16") < 0.52


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("heads", [slice(0, HEADS), slice(1, 3)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_each_device_means_what_the_reference_means(block_size: int, heads: slice, wire: str) -> None:
    held, into, into_reference = arena(block_size), arena(block_size), arena(block_size)
    into_reference.copy_(into)
    at = granules([4, 0, 11, 7, 2], block_size, 5)
    packed = pack_granules(held, at, heads, wire)
    assert packed.equal(reference.pack_granules(held, at, heads, wire))
    unpack_granules(into, at, heads, wire, packed)
    reference.unpack_granules(into_reference, at, heads, wire, packed)
    assert into.equal(into_reference)
