"""Attention by this package's own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.gpu.attention import Attention, PagedBatch, processors_of
from kernels.gpu.decode_attention import decode_attention, split_count
from kernels.gpu.paged import Look
from kernels.gpu.prefill_attention import prefill_attention

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def triton_attention(device: torch.device) -> Attention:
    """Which has processors to keep busy."""
    processors = processors_of(device)

    def decode(query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
        rows = slice(0, batch.decode_rows)
        splits = split_count(batch.decode_rows, layer.shape[2], processors)
        decode_attention(query[rows], layer, batch.rows.part(rows), look, splits, out[rows])

    def prefill(query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
        assert batch.tiles is not None, "chunks are cut into tiles"
        prefill_attention(query, layer, batch.rows, batch.tiles, look, out)

    return Attention(decode, prefill)
