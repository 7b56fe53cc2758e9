"""Triton's attention under trial, and a model whose attention is another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

from diptych.types import ModelSource
from kernels import Segment
from kernels.gpu.paged import Look
from kernels.gpu.triton_attention import triton_attention
from tests.kernels.attention_ways import reference_attention, torch_attention
from workers.engine.attention_trial import Shape, difference
from workers.engine.batch import Batch
from workers.engine.triton_model import TritonModel
from workers.engine.weights import load_weights

SHAPE = Shape(2, 1, 32, 16, torch.bfloat16, (Look(0.125), Look(0.125, window=100, soft_cap=50.0)))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_triton_agrees_with_the_reference_and_with_no_wrong_one(device: torch.device, part: Any) -> None:
    ours = triton_attention(device)
    assert difference(part, ours, reference_attention(), SHAPE, device) < 1
    for fault in ("window", "last key"):
        assert difference(part, ours, torch_attention(fault), SHAPE, device) > 1


@pytest.mark.slow
def test_a_model_computes_the_same_with_anothers_attention(device: torch.device) -> None:
    source = ModelSource(name="random:tiny-gemma3", path="random:tiny-gemma3", digest="0123456789abcdef")
    weights = load_weights(source, "fp32", cache=None)
    config = weights.config
    arenas = [torch.zeros(16, config.layers, 2, config.kv_heads, 16, config.head_dim, device=device) for _ in "12"]
    models = [
        TritonModel(weights, max_context=512, device=device, graphs=False, attention=attention)
        for attention in (None, reference_attention())
    ]
    table, other = [3, 9, 1, 4, 11], [2, 7]
    prompt = Batch(tokens=[*range(70)], segments=[Segment(0, 70, table)], decode_rows=0, wanted=[69])
    mixed = Batch(
        tokens=[*range(21)], segments=[Segment(70, 1, table), Segment(0, 20, other)], decode_rows=1, wanted=[0, 20]
    )
    for batch in (prompt, mixed):
        wanted, found = (model.forward(batch, arena).values for model, arena in zip(models, arenas, strict=True))
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
