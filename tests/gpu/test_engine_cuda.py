"""The engine on a GPU gives what it gives on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernels
from diptych.hashing import KvIdentity, granule_hashes
from diptych.types import FrontId, ModelSource, Request, RequestId, SamplingParams
from workers.engine.engine import Engine, EngineLimits
from workers.engine.loading import GpuChoice, load_model
from workers.engine.model import Model
from workers.engine.sequence import Sequence
from workers.engine.weights import load_weights

pytestmark = pytest.mark.gpu

TINY = ModelSource(name="random:tiny", path="random:tiny", digest="0123456789abcdef")
ROOT = KvIdentity(model_digest=TINY.digest, weight_format="fp32", kv_dtype="fp32").root()


LIMITS = EngineLimits(block_size=16, blocks=256, max_batch_tokens=128, max_running=16, max_context=4096)


def engine(device: torch.device) -> Engine:
    model = Model(load_weights(TINY, "fp32", cache=None), max_context=4096, device=device)
    return Engine(model, LIMITS, dtype="fp32", device=device)


def engine_as_served(device: torch.device, **choice: Any) -> Engine:
    """bf16, computed as a worker would."""
    loaded = load_model(TINY, "bf16", "auto", cache=None, device=device, threads=1, on_gpu=GpuChoice(**choice))
    print(loaded.how)
    return Engine(loaded.model, LIMITS, dtype="bf16", device=device)


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    sequences: list[Sequence] = []
    for number, prompt in enumerate(prompts):
        request = Request(
            id=RequestId(f"r{number}"),
            front=FrontId("f"),
            tokens=tuple(prompt),
            granules=granule_hashes(prompt, ROOT),
            root=ROOT,
            params=SamplingParams(max_tokens=24, temperature=0.0),
        )
        sequence = Sequence(request=request, attempt=0, task="answer", arrival=number, block_size=16)
        sequences.append(sequence)
        engine.add(sequence)
    while engine.has_work:
        for sampled in engine.step().sampled:
            if sampled.finish:
                engine.drop(sampled.sequence)
        engine.pool.check()
    return [sequence.tokens for sequence in sequences]


def test_greedy_answers_equal_the_cpus(cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 17, 255, 300, 600)]
    assert answers(engine(cuda), prompts) == answers(engine(torch.device("cpu")), prompts)


def test_graphs_change_no_answer(cuda: torch.device) -> None:
    """Batches grow and shrink through the buckets. In bf16 sums differ by a rounding or two, so answers may part."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 17, 255, 300, 600)]
    with_graphs = answers(engine_as_served(cuda, kernels="triton"), prompts)
    without = answers(engine_as_served(cuda, kernels="triton", graphs=False), prompts)
    plain = answers(engine_as_served(cuda, kernels="reference"), prompts)
    for prompt, ours, theirs, torchs in zip(prompts, with_graphs, without, plain, strict=True):
        assert len(ours) == len(prompt) + 24
        assert ours[: len(prompt) + 1] == theirs[: len(prompt) + 1]
        assert agreement(ours, theirs) >= 0.75 or agreement(ours, torchs) >= 0.75


def agreement(one: list[int], other: list[int]) -> float:
    """The share of tokens before the first that differs."""
    same = next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
    return same / len(one)


def test_attention_is_the_cpus_within_rounding(cuda: torch.device) -> None:
    torch.manual_seed(0)
    arena = torch.randn(64, 2, 2, 16, 64)
    query = torch.randn(300, 8, 64)
    blocks = torch.randperm(64)[:32]
    ours = kernels.prefill_attention(query.to(cuda), arena.to(cuda), blocks.to(cuda), 0, 0.125)
    theirs = kernels.prefill_attention(query, arena, blocks, 0, 0.125)
    torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)


def test_packed_granules_are_the_cpus(cuda: torch.device) -> None:
    """The wires that round are in tests/kernels/gpu: sums on tensor cores fall on the other side of a tie."""
    torch.manual_seed(0)
    wire = "bf16"
    arena = torch.randn(32, 4, 2, 2, 32, 64).to(torch.bfloat16)
    blocks, parts = torch.tensor([3, 1, 30]), torch.tensor([0, 1, 1])
    there = kernels.Granules(blocks.to(cuda), parts.to(cuda))
    packed = kernels.pack_granules(arena.to(cuda), there, slice(0, 2), wire)
    assert torch.equal(packed.cpu(), kernels.pack_granules(arena, kernels.Granules(blocks, parts), slice(0, 2), wire))
    target, on_cuda = torch.zeros_like(arena), torch.zeros_like(arena, device=cuda)
    kernels.unpack_granules(target, kernels.Granules(blocks, parts), slice(0, 2), wire, packed.cpu())
    kernels.unpack_granules(on_cuda, there, slice(0, 2), wire, packed)
    assert torch.equal(on_cuda.cpu(), target)
