"""What FlashInfer is told of a batch, by hand, and where it can't be used. Needs neither FlashInfer nor Triton."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from kernels import Segment
from kernels.gpu import flashinfer_attention
from kernels.gpu.flashinfer_attention import pages_of, reason_against
from workers.engine.batch import Batch
from workers.engine.row_numbers import device_batch

CUDA = torch.device("cuda", 0)


def told(segments: list[Segment], block_size: int = 16) -> list[list[int]]:
    pages = pages_of(segments, block_size)
    assert all(each.dtype == torch.int32 for each in pages)
    assert all(each.device.type == "cpu" for each in pages)
    return [each.tolist() for each in pages]


def test_a_row_that_decodes_is_a_chunk_of_one() -> None:
    # Keys: 1 (one block), 16 (one, full), 17 (a second, with one key), 33.
    segments = [Segment(0, 1, [5]), Segment(15, 1, [7]), Segment(16, 1, [4, 6]), Segment(32, 1, [1, 2, 3])]
    assert told(segments) == [[0, 1, 2, 3, 4], [0, 1, 2, 4, 7], [1, 16, 1, 1]]


def test_chunks_have_their_prefixes_in_their_tables() -> None:
    # Keys: 32 of 32 new; 30 + 3; 100 + 28, all of them in whole blocks.
    segments = [Segment(0, 32, [8, 9]), Segment(30, 3, [2, 3, 1]), Segment(100, 28, [*range(10, 18)])]
    assert told(segments) == [[0, 32, 35, 63], [0, 2, 5, 13], [16, 1, 16]]
    assert told(segments, 32) == [[0, 32, 35, 63], [0, 1, 3, 7], [32, 1, 32]]


def test_a_batchs_ids_are_its_tables_in_this_order() -> None:
    # Tables may be longer than what their keys need: a block that was reserved is not told.
    decodes = [Segment(16, 1, [4, 6, 9]), Segment(2, 1, [0, 5])]
    chunks = [Segment(30, 3, [2, 3, 1, 8])]
    batch = Batch(tokens=[0] * 5, segments=[*decodes, *chunks], decode_rows=2, wanted=[])
    on_device = device_batch(batch, 16, 64, torch.device("cpu"))
    assert on_device.segments == batch.segments
    assert on_device.rows.ids.tolist() == [4, 6, 0, 2, 3, 1]
    assert [told(decodes)[1], told(chunks)[1]] == [[0, 2, 3], [0, 3]]


@pytest.mark.parametrize(
    ("dim", "dtype", "device", "able", "reason"),
    [
        (128, torch.bfloat16, CUDA, (9, 0), ""),
        (64, torch.bfloat16, CUDA, (8, 0), ""),
        (128, torch.bfloat16, torch.device("cpu"), (9, 0), "FlashInfer is for GPUs"),
        (128, torch.float32, CUDA, (9, 0), "not in torch.float32"),
        (80, torch.bfloat16, CUDA, (9, 0), "no kernels for heads of 80, only of 64, 128, 256"),
        (128, torch.bfloat16, CUDA, (7, 5), "needs compute capability 8.0, this GPU has 7.5"),
    ],
)
def test_why_it_cannot_be_used(
    dim: int, dtype: torch.dtype, device: torch.device, able: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer_attention, "find_spec", lambda _: "there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: able)
    assert reason_against(dim, dtype, device).endswith(reason)
    assert bool(reason_against(dim, dtype, device)) == bool(reason)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is not None, reason="FlashInfer is installed here")
def test_without_it_the_way_to_it_is_told() -> None:
    assert reason_against(128, torch.bfloat16, CUDA) == (
        "FlashInfer is not installed: pip install 'diptych[flashinfer]'"
    )
