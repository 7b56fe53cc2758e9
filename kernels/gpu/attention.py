"""Attention as a step asks for it, whoever computes it. Needs neither Triton nor FlashInfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from kernels.cpu.decoder import Segment
from kernels.gpu.paged import Look, PagedRows, RowTiles

_INTERPRETED_PROCESSORS = 4
"""As good as any, where there is no device to ask."""


class PagedBatch(Protocol):
    """A step's rows: those that decode, then prompt chunks. Each step has one of its own."""

    @property
    def rows(self) -> PagedRows: ...

    @property
    def decode_rows(self) -> int: ...

    @property
    def tiles(self) -> RowTiles | None:
        """Of the chunks, if there are any."""
        ...

    @property
    def segments(self) -> Sequence[Segment]:
        """The same rows on the host, for whoever plans there; none while a graph is captured."""
        ...


Attend: TypeAlias = Callable[[Tensor, Tensor, PagedBatch, Look, Tensor], None]
"""(query, layer, batch, look, out): fills its part of `out` and leaves the rest alone.

query, out: [rows, heads, head_dim], rows one after another
layer: [blocks, 2, kv_heads, block_size, head_dim], one layer of the arena; the rows' own keys are in it already
"""


class Attention(NamedTuple):
    """Who computes which rows."""

    decode: Attend
    """The rows that decode."""
    prefill: Attend
    """The chunks' rows."""


def processors_of(device: torch.device) -> int:
    """To be kept busy."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count  # pyright: ignore
