"""Attention by FlashInfer (Ye et al. 2025), where it is installed. Importing this doesn't need it.

A layer of the arena is FlashInfer's HND cache as it lies: [pages, 2, kv_heads, page_size, head_dim]
with pages a whole block of all layers apart; its kernels take that stride, and count places in 64 bits.
A decoding row is a chunk of one, which is also how FlashInfer decodes on tensor cores.

What a batch needs is planned on the host, once for all layers that look back alike: on the first of
them. It can't be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.decoder import Segment
from kernels.gpu.attention import Attention, PagedBatch, processors_of
from kernels.gpu.paged import Look

HEAD_DIMS: Final = (64, 128, 256)
_CAPABILITY: Final = (8, 0)
_HOPPER: Final = (9, 0)
_WORKSPACE_BYTES: Final = 128 << 20
"""What FlashInfer advises."""


def reason_against(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why it can't compute for such a model and KV in `dtype`; empty if it may."""
    if device.type != "cuda":
        return "FlashInfer is for GPUs"
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed: pip install 'diptych[flashinfer]'"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer computes with KV in bf16 or fp16 here, not in {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer has no kernels for heads of {head_dim}, only of {', '.join(map(str, HEAD_DIMS))}"
    if (able := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        return f"FlashInfer needs compute capability 8.0, this GPU has {able[0]}.{able[1]}"
    return ""


class Pages(NamedTuple):
    """Sequences under FlashInfer's names: int32, on the host."""

    qo_indptr: Tensor
    """[sequences + 1] where each one's rows begin, and the last one's end."""
    kv_indptr: Tensor
    """[sequences + 1] where each one's block table begins, and the last one's ends."""
    last_page_len: Tensor
    """[sequences] keys in the last block, at least one."""


def pages_of(segments: Sequence[Segment], block_size: int) -> Pages:
    """Of sequences whose tables lie one after another, each as long as its keys need."""
    counts = np.array([segment.count for segment in segments], dtype=np.int32)
    ends = np.array([segment.start for segment in segments], dtype=np.int32) + counts
    blocks = (ends + block_size - 1) // block_size
    indptrs = [np.concatenate(([0], np.cumsum(each))).astype(np.int32) for each in (counts, blocks)]
    last = (ends - (blocks - 1) * block_size).astype(np.int32)
    return Pages(*(torch.from_numpy(each) for each in (*indptrs, last)))  # pyright: ignore[reportUnknownMemberType]


class _Planned:
    """FlashInfer's wrapper for one part of the batches' rows, in layers that look back alike."""

    def __init__(self, wrapper: Any, look: Look, *, decoding: bool) -> None:  # noqa: ANN401  (untyped)
        self._wrapper, self._look, self._decoding = wrapper, look, decoding
        self._batch: PagedBatch | None = None
        self._copied = torch.cuda.Event()

    def run(self, query: Tensor, layer: Tensor, batch: PagedBatch, out: Tensor) -> None:
        """As `Attend`."""
        assert layer.dtype == query.dtype, "a cache in other numbers was not tried"
        assert batch.segments, "planned on the host, which a graph can't hold"
        rows = slice(0, batch.decode_rows) if self._decoding else slice(batch.decode_rows, None)
        if self._batch is not batch:
            self._plan(query, layer, batch, batch.segments[rows])
            self._batch = batch
        self._wrapper.run(query[rows], layer, out=out[rows])

    def _plan(self, query: Tensor, layer: Tensor, batch: PagedBatch, segments: Sequence[Segment]) -> None:
        _, heads, dim = query.shape
        kv_heads, block_size = layer.shape[2:4]
        pages = pages_of(segments, block_size)
        tables, ids = int(pages.kv_indptr[-1]), batch.rows.ids
        # A plan leaves by a copy from one pinned buffer, which the next one overwrites.
        self._copied.synchronize()
        self._wrapper.plan(
            pages.qo_indptr,
            pages.kv_indptr,
            ids[:tables] if self._decoding else ids[len(ids) - tables :],
            pages.last_page_len,
            heads,
            kv_heads,
            dim,
            block_size,
            causal=True,
            sm_scale=self._look.scale,
            # Keys before the query's own.
            window_left=-1 if self._look.window is None else self._look.window - 1,
            logits_soft_cap=self._look.soft_cap,
            q_data_type=query.dtype,
            kv_data_type=layer.dtype,
        )
        self._copied.record()


class _FlashInfer:
    """For one model on one GPU, whose steps follow one another on one stream."""

    def __init__(self, group: int, head_dim: int, device: torch.device) -> None:
        self._wrapper: Any = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper  # untyped
        # Where it shares out a row's keys: 128 rows, in fp32, of each of two programs on every processor.
        shares = group * 2 * processors_of(device) * 128 * (head_dim + 1) * 4 + (1 << 20)
        self._workspace = torch.zeros(max(_WORKSPACE_BYTES, shares), dtype=torch.uint8, device=device)
        self._for_chunks = "fa3" if torch.cuda.get_device_capability(device) == _HOPPER else "fa2"
        self._planned: dict[tuple[bool, Look], _Planned] = {}

    def decode(self, query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
        self._of(look, decoding=True).run(query, layer, batch, out)

    def prefill(self, query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
        self._of(look, decoding=False).run(query, layer, batch, out)

    def _of(self, look: Look, *, decoding: bool) -> _Planned:
        if (decoding, look) not in self._planned:
            # By name: left to itself FlashInfer may take for one batch what was not tried with another.
            backend = "fa2" if decoding else self._for_chunks
            wrapper = self._wrapper(self._workspace, "HND", backend=backend)
            self._planned[decoding, look] = _Planned(wrapper, look, decoding=decoding)
        return self._planned[decoding, look]


def flashinfer_attention(group: int, head_dim: int, device: torch.device) -> Attention:
    """group: query heads of a KV head. Raises what FlashInfer raises: ImportError, and anything when it first runs."""
    made = _FlashInfer(group, head_dim, device)
    return Attention(made.decode, made.prefill)
