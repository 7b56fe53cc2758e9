"""The GPU's forward pass against `Model` in fp32 on a CPU, for every family; graphs against their absence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

from diptych.types import ModelSource
from kernels import Segment
from workers.engine.batch import Batch
from workers.engine.decode_graphs import BUCKETS, StaticBatch, bucket_of
from workers.engine.model import Model
from workers.engine.row_numbers import device_batch, row_numbers
from workers.engine.triton_model import TritonModel
from workers.engine.weights import Weights, load_weights

FP8 = torch.float8_e4m3fn

BLOCK, CONTEXT, BLOCKS = 16, 512, 64
FAMILIES = ("tiny", "tiny-llama-yarn", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-gemma2", "tiny-gemma3")
CPU = torch.device("cpu")


def weights_of(shape: str, dtype: str = "fp32") -> Weights:
    source = ModelSource(name=f"random:{shape}", path=f"random:{shape}", digest="0123456789abcdef")
    return load_weights(source, dtype, cache=None)


def arena_of(weights: Weights, kv: torch.dtype | None = None) -> Tensor:
    config = weights.config
    dtype = kv or weights.tensors["model.norm.weight"].dtype
    return torch.zeros(BLOCKS, config.layers, 2, config.kv_heads, BLOCK, config.head_dim, dtype=dtype)


TABLES = [list(range(at, BLOCKS, 4)) for at in range(4)]
"""Of four sequences: each its own blocks, none next to another."""


def drawn(count: int, seed: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompts(lengths: list[int]) -> Batch:
    """Whole prompts of sequences 0, 1, …"""
    segments = [Segment(0, length, TABLES[at]) for at, length in enumerate(lengths)]
    ends = torch.tensor(lengths).cumsum(0) - 1
    return Batch(tokens=drawn(sum(lengths), 1), segments=segments, decode_rows=0, wanted=ends.tolist())


def mixed(lengths: list[int]) -> Batch:
    """A token of each but the last, longest first, and a piece of the last."""
    order = sorted(range(len(lengths) - 1), key=lambda at: -lengths[at])
    segments = [Segment(lengths[at], 1, TABLES[at]) for at in order]
    segments.append(Segment(lengths[-1], 9, TABLES[len(lengths) - 1]))
    rows = len(order)
    return Batch(tokens=drawn(rows + 9, 2), segments=segments, decode_rows=rows, wanted=[1, 0, rows + 8, rows + 3])


def decoding(lengths: list[int]) -> Batch:
    """A token of each, longest first, wanted in another order."""
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    segments = [Segment(lengths[at], 1, TABLES[at]) for at in order]
    return Batch(tokens=drawn(len(order), 3), segments=segments, decode_rows=len(order), wanted=[2, 0, 1])


@pytest.mark.parametrize("shape", FAMILIES)
def test_its_logits_are_the_models(device: torch.device, shape: str) -> None:
    weights = weights_of(shape)
    ours = TritonModel(weights, max_context=CONTEXT, device=device, graphs=device.type == "cuda")
    theirs = Model(weights, max_context=CONTEXT, device=CPU)
    on, off = arena_of(weights).to(device), arena_of(weights)
    lengths = [70, 3, 33]
    for batch in (prompts(lengths), mixed(lengths), decoding([71, 4, 42]), decoding([72, 5, 43])):
        found, wanted = ours.forward(batch, on), theirs.forward(batch, off)
        assert wanted.values.std() > 0.1, "the comparison means nothing if nothing is said"
        torch.testing.assert_close(found.values.cpu(), wanted.values, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(on.cpu(), off, atol=1e-4, rtol=1e-4)
        assert found.highest.tolist() == wanted.highest.tolist()
        assert found.finite.all()


@pytest.mark.parametrize("shape", ["tiny", "tiny-gemma2"])
def test_its_logits_over_a_cache_in_fp8_are_nearly_the_models(device: torch.device, shape: str) -> None:
    """A number on the other side of a tie is a step of fp8 away, so nearly is all there is."""
    weights = weights_of(shape)
    ours = TritonModel(weights, max_context=CONTEXT, device=device, graphs=device.type == "cuda")
    theirs = Model(weights, max_context=CONTEXT, device=CPU)
    on, off = (arena_of(weights, FP8).to(where) for where in (device, CPU))
    exact = arena_of(weights)
    for batch in (prompts([70, 3, 33]), mixed([70, 3, 33]), decoding([71, 4, 42])):
        found, wanted = ours.forward(batch, on).values.cpu(), theirs.forward(batch, off).values
        rounded = (wanted - theirs.forward(batch, exact).values).square().mean().sqrt()
        assert rounded > 0, "it is fp8"
        assert (found - wanted).square().mean().sqrt() < 0.5 * rounded
    same = on.cpu().view(torch.uint8) == off.view(torch.uint8)
    assert same.float().mean() > 0.99


def test_a_chunk_that_nobody_asks_for_logits_of_fills_the_cache(device: torch.device) -> None:
    weights = weights_of("tiny")
    on, off = arena_of(weights).to(device), arena_of(weights)
    batch = Batch(tokens=drawn(20, 1), segments=[Segment(0, 20, TABLES[0])], decode_rows=0, wanted=[])
    found = TritonModel(weights, max_context=CONTEXT, device=device, graphs=False).forward(batch, on)
    Model(weights, max_context=CONTEXT, device=CPU).forward(batch, off)
    assert found.values.shape == (0, weights.config.vocabulary)
    torch.testing.assert_close(on.cpu(), off, atol=1e-4, rtol=1e-4)


def test_rows_that_pad_a_bucket_change_nothing(device: torch.device) -> None:
    weights = weights_of("tiny-qwen3")
    model = TritonModel(weights, max_context=CONTEXT, device=device, graphs=False)
    arena = arena_of(weights).to(device)
    model.forward(prompts([70, 3, 33]), arena)
    batch, padded = decoding([70, 3, 33]), arena.clone()
    plain = device_batch(batch, BLOCK, 64, device)
    numbers = row_numbers(
        [batch.tokens[row] for row in batch.wanted], [batch.segments[row] for row in batch.wanted], BLOCK
    )
    static = StaticBatch(CONTEXT // BLOCK, device)
    # What an earlier, larger batch left behind must not be taken for rows.
    static.fill(row_numbers([9] * 8, [Segment(5, 1, TABLES[3])] * 8, BLOCK), 8)
    static.fill(numbers, 8)
    with torch.inference_mode():
        wanted = model._forward(plain, arena)
        found = model._forward(static.batch(8), padded)
    torch.testing.assert_close(found[:3], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded, arena, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_eight_bits_say_nearly_the_same(device: torch.device, bits: str) -> None:
    weights = weights_of("tiny-llama", "bf16")
    exact, narrow = (
        TritonModel(weights, max_context=CONTEXT, device=device, bits=each, graphs=False) for each in (None, bits)
    )
    batch, arena = prompts([70, 3, 33]), arena_of(weights).to(device)
    wanted, found = (model.forward(batch, arena).values for model in (exact, narrow))
    off = (found - wanted).norm() / wanted.norm()
    assert 0 < off < (0.05 if bits == "int8" else 0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_graphs_give_what_launches_give(dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: run tests/gpu/run on a machine that has one")
    device = torch.device("cuda", 0)
    weights = weights_of("tiny-gemma3", dtype)
    with_graphs, without = (
        TritonModel(weights, max_context=CONTEXT, device=device, graphs=graphs) for graphs in (True, False)
    )
    arenas = [arena_of(weights).to(device) for _ in range(2)]
    for model, arena in zip((with_graphs, without), arenas, strict=True):
        model.forward(prompts([70, 3, 33, 20]), arena)
    for step in range(6):
        # Batches that shrink and grow: buckets are captured, left and used again.
        count = (3, 2, 1, 3, 4, 3)[step]
        rows = sorted(((70, 3, 33, 20)[at] + step, at) for at in range(count))[::-1]
        segments = [Segment(length, 1, TABLES[at]) for length, at in rows]
        batch = Batch(tokens=drawn(count, step), segments=segments, decode_rows=count, wanted=[*range(count)])
        found, wanted = with_graphs.forward(batch, arenas[0]), without.forward(batch, arenas[1])
        near = 1e-4 if dtype == "fp32" else 0.05
        torch.testing.assert_close(found.values, wanted.values, atol=near, rtol=near)
        torch.testing.assert_close(*arenas, atol=near, rtol=near)


def test_a_bucket_holds_its_rows() -> None:
    assert [bucket_of(rows) for rows in (1, 2, 3, 8, 9, 17, 256)] == [1, 2, 4, 8, 16, 24, 256]
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_row_numbers_say_where_each_rows_keys_lie() -> None:
    numbers = row_numbers([7, 8, 9, 5], [Segment(16, 1, [4, 6, 9]), Segment(30, 3, [2, 3, 1, 8])], BLOCK)
    assert numbers.positions.tolist() == [16, 30, 31, 32]
    assert numbers.starts.tolist() == [0, 2, 2, 2]
    assert numbers.ids.tolist() == [4, 6, 2, 3, 1]
