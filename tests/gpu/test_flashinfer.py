"""FlashInfer on a GPU against the reference; loudly skipped where it isn't installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diptych.types import ModelSource
from kernels import Segment
from kernels.gpu.attention import Attention
from kernels.gpu.flashinfer_attention import flashinfer_attention, reason_against
from kernels.gpu.paged import Look
from tests.kernels.attention_ways import reference_attention
from workers.engine.attention_trial import Shape, difference
from workers.engine.batch import Batch
from workers.engine.loading import GpuChoice, load_model
from workers.engine.row_numbers import device_batch

pytestmark = pytest.mark.gpu

LOOKS = (Look(0.1), Look(0.1, window=4096), Look(0.1, soft_cap=50.0), Look(0.1, window=100, soft_cap=30.0))
SHAPES = [(32, 8, 128, 16), (4, 4, 64, 32), (8, 2, 256, 64), (12, 4, 128, 16), (28, 4, 128, 16), (8, 1, 64, 256)]
MODEL = ModelSource(name="random:llama-1b", path="random:llama-1b", digest="0123456789abcdef")
FAR = 2**32
"""Numbers: what 32 bits can't count."""


@pytest.fixture
def flashinfer(cuda: torch.device) -> torch.device:
    if reason := reason_against(128, torch.bfloat16, cuda):
        pytest.skip(reason)
    return cuda


def made(shape: tuple[int, int, int, int], device: torch.device) -> Attention:
    return flashinfer_attention(shape[0] // shape[1], shape[2], device)


@pytest.mark.parametrize("part", ["decode", "prefill"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference_within_rounding(
    flashinfer: torch.device, shape: tuple[int, int, int, int], part: Any
) -> None:
    said = Shape(*shape, torch.bfloat16, LOOKS)
    assert difference(part, reference_attention(), made(shape, flashinfer), said, flashinfer) < 1


def computed(attention: Attention, arena: torch.Tensor, blocks: list[int], query: torch.Tensor) -> torch.Tensor:
    """A row that decodes after 40 keys, then a chunk of 30 after 3, of another sequence."""
    segments = [Segment(39, 1, blocks[:3]), Segment(3, 30, blocks[3:])]
    batch = Batch(tokens=[0] * 31, segments=segments, decode_rows=1, wanted=[])
    out, layer = torch.empty_like(query), arena[:, 1]
    on_device = device_batch(batch, arena.shape[4], 64, query.device)
    attention.decode(query, layer, on_device, LOOKS[0], out)
    attention.prefill(query, layer, on_device, LOOKS[0], out)
    return out


def test_blocks_may_lie_beyond_what_32_bits_count(flashinfer: torch.device) -> None:
    per_block = 64 * 2 * 8 * 16 * 128
    blocks = FAR // per_block + 8
    if torch.cuda.mem_get_info(flashinfer)[0] < 2 * 2 * per_block * blocks:
        pytest.skip(f"needs {4 * per_block * blocks >> 30} GiB of free GPU memory")
    far = torch.empty(blocks, 64, 2, 8, 16, 128, dtype=torch.bfloat16, device=flashinfer)
    far[-8:] = near = torch.randn(8, 64, 2, 8, 16, 128, dtype=torch.bfloat16, device=flashinfer)
    query = torch.randn(31, 32, 128, dtype=torch.bfloat16, device=flashinfer)
    attention, table = made(SHAPES[0], flashinfer), [7, 2, 5, 1, 0, 6]
    found = computed(attention, far, [blocks - 8 + each for each in table], query)
    assert torch.equal(found, computed(attention, near, table, query))
    assert computed(reference_attention(), near, table, query).sub(found).abs().max() < 0.02


def test_what_is_not_finite_in_a_seen_key_shows(flashinfer: torch.device) -> None:
    """The engine fails a sequence by it."""
    arena = torch.randn(8, 2, 2, 8, 16, 128, dtype=torch.bfloat16, device=flashinfer)
    arena[2, 1, 0, :, 5] = torch.nan
    query = torch.randn(31, 32, 128, dtype=torch.bfloat16, device=flashinfer)
    found = computed(made(SHAPES[0], flashinfer), arena, [7, 2, 5, 1, 0, 6], query)
    assert found[0].isnan().all()
    assert not found[1:].isnan().any()


@pytest.mark.parametrize("graphs", [True, False])
def test_a_model_says_the_same_with_either(flashinfer: torch.device, graphs: bool) -> None:
    logits: list[list[torch.Tensor]] = []
    table, other = [*range(40, 10, -1)], [*range(50, 60)]
    tokens = torch.randint(0, 256, (450,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = [
        Batch(tokens=tokens[:300], segments=[Segment(0, 300, table)], decode_rows=0, wanted=[299]),
        Batch(
            tokens=tokens[300:350],
            segments=[Segment(300, 1, table), Segment(0, 49, other)],
            decode_rows=1,
            wanted=[0, 49],
        ),
        Batch(
            tokens=tokens[350:352],
            segments=[Segment(301, 1, table), Segment(49, 1, other)],
            decode_rows=2,
            wanted=[0, 1],
        ),
    ]
    for asked in ("triton", "flashinfer"):
        loaded = load_model(
            MODEL, "bf16", "auto", cache=None, device=flashinfer, threads=1,
            on_gpu=GpuChoice("triton", graphs, asked),
        )  # fmt: skip
        print(loaded.how)
        assert f"of prompts {asked}" in loaded.how or asked == "triton"
        config = loaded.model.config
        arena = torch.zeros(
            64, config.layers, 2, config.kv_heads, 16, config.head_dim, dtype=torch.bfloat16, device=flashinfer
        )
        logits.append([loaded.model.forward(step, arena).values.cpu().clone() for step in steps])
    for ours, theirs in zip(*logits, strict=True):
        assert (ours - theirs).norm() / ours.norm() < 0.05
