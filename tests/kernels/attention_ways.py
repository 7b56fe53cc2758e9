"""Attention with the reference's meaning, and once more by torch's own, behind the interface that GPUs use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from kernels import Segment
from kernels.gpu.attention import Attend, Attention, PagedBatch
from kernels.gpu.paged import Look
from kernels.reference import attention as reference

Fault: TypeAlias = Literal["", "window", "cap", "last key", "first key", "wrong block", "scale", "head", "NaN"]

One: TypeAlias = Callable[[Tensor, Tensor, Segment, Look], Tensor]


def reference_attention() -> Attention:
    """In fp32."""

    def one(query: Tensor, layer: Tensor, segment: Segment, look: Look) -> Tensor:
        per_split = reference.SPLIT // layer.shape[3]
        blocks = segment.blocks[: -(-(segment.start + segment.count) // layer.shape[3])]
        padded = torch.tensor([*blocks, *blocks[:1] * (-len(blocks) % per_split)], device=query.device)
        return reference.prefill_attention(
            query.float(), layer, padded, segment.start, look.scale, window=look.window, soft_cap=look.soft_cap
        )

    return _both(one)


def torch_attention(fault: Fault = "") -> Attention:
    """By `scaled_dot_product_attention` where scores aren't capped, and in plain steps where they are. `fault` is
    what may be wrong with such a thing."""

    def one(query: Tensor, layer: Tensor, segment: Segment, look: Look) -> Tensor:
        start, count = segment.start, segment.count
        end, group = start + count, query.shape[1] // layer.shape[2]
        blocks = list(segment.blocks)
        if fault == "wrong block" and len(blocks) > 1:
            blocks[:2] = blocks[1::-1]
        keys, values = (
            layer[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :end].float().repeat_interleave(group, 1)
        )
        if fault == "head":
            keys = keys.roll(1, 0)
        at = torch.arange(start, end, device=query.device)[:, None]
        key_at = torch.arange(end, device=query.device)
        seen = key_at <= at
        if fault == "last key":
            seen = seen & ((key_at < at) | (at == 0))
        if fault == "first key":
            seen = seen & ((key_at > 0) | (at == 0))
        if look.window is not None:
            seen = seen & (key_at > at - look.window - int(fault == "window"))
        rows = query.float().transpose(0, 1)
        scale = look.scale * (1.05 if fault == "scale" else 1)
        if look.soft_cap is None or fault == "cap":
            found = functional.scaled_dot_product_attention(rows, keys, values, attn_mask=seen, scale=scale)
        else:
            scores = look.soft_cap * torch.tanh(rows @ keys.mT * (scale / look.soft_cap))
            found = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        if fault == "NaN":
            found[0, -1, 0] = torch.nan
        return found.transpose(0, 1)

    return _both(one)


def _both(one: One) -> Attention:
    """one: (query of a segment, layer, segment, look) → its output"""

    def part(*, decoding: bool) -> Attend:
        def attend(query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
            for rows, segment in _segments(batch, decoding=decoding):
                out[rows] = one(query[rows], layer, segment, look).to(out.dtype)

        return attend

    return Attention(part(decoding=True), part(decoding=False))


def _segments(batch: PagedBatch, *, decoding: bool) -> Iterator[tuple[slice, Segment]]:
    row = 0
    for number, segment in enumerate(batch.segments):
        if (number < batch.decode_rows) == decoding:
            yield slice(row, row + segment.count), segment
        row += segment.count
