"""Attention over a paged KV cache, in fixed splits. Knows block tables, not sequences.

A query's keys are visited in splits of 256 positions that start at position 0, whatever the chunk
or batch it came in, and the partial softmaxes are merged from the first split to the last (online
softmax, Milakov and Gimelshein 2018; split-KV as in Flash-Decoding, Dao 2023). A split that a
query doesn't reach multiplies by exactly 1 and adds exactly 0. So in fp32 a token's output has
the same bits alone or batched, chunked or whole, cached or computed. Scores and sums are fp32 for
every KV dtype.

With a window of w, a query sees its own key and the w - 1 before it. Splits that no query of the
call sees are not visited; to a query, a split that it doesn't see is nothing either way.

Positions past a sequence's end are masked, and their values count as zeros: a block may hold anything
there, the infinities of a sequence that overflowed included (0 times one is not 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference.elementwise import soft_cap as _soft_cap
from kernels.reference.fp8 import moved
from kernels.reference.linear import pad_rows

SPLIT = 256


class DecodeTable(NamedTuple):
    """Where a batch of single-token queries finds its keys.

    Rows are sorted by falling length, so that split j concerns the first `reach[j]` rows.
    """

    blocks: Tensor
    """[rows, splits * blocks per split] block ids, padded with any valid id."""
    lengths: Tensor
    """[rows] keys to attend to, falling."""
    reach: tuple[int, ...]
    """Rows that have keys in split j, one entry a split."""


class _Running(NamedTuple):
    """A partial softmax: unnormalised output [..., rows, dim], sum and maximum [..., rows, 1]."""

    output: Tensor
    total: Tensor
    maximum: Tensor


def decode_attention(
    query: Tensor,
    layer: Tensor,
    table: DecodeTable,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """One new token per row. query: [rows, heads, head_dim] → the same shape.

    layer: [blocks, 2, kv_heads, block_size, head_dim]
    window: keys each query sees, its own included  soft_cap: scores are squeezed into ± this
    """
    rows, heads, head_dim = query.shape
    kv_heads, block_size = layer.shape[2], layer.shape[3]
    grouped = pad_rows(query.float().reshape(rows, kv_heads, heads // kv_heads, head_dim))
    state: _Running | None = None
    for split, reach in enumerate(table.reach):
        past = _rows_past(table, split, window)
        if past == reach:
            continue
        columns = slice(split * SPLIT // block_size, (split + 1) * SPLIT // block_size)
        keys, values = _gather(layer, table.blocks[past:reach, columns])
        positions = torch.arange(split * SPLIT, (split + 1) * SPLIT, device=query.device)
        lengths = table.lengths[past:reach, None, None, None]
        visible = positions < lengths
        ending = table.reach[split + 1] if split + 1 < len(table.reach) else 0
        values[max(0, ending - past) :].masked_fill_(~visible[max(0, ending - past) :].transpose(-1, -2), 0.0)
        if window is not None:
            visible &= positions >= lengths - window
        part = _attend(grouped[past:reach], keys, values, visible, scale, soft_cap)
        if state is None and reach - past < rows:
            state = _nothing(part, rows)
        state = part if state is None else _merge_rows(state, part, past)
    assert state is not None, "a decode batch has at least one row"
    output = state.output / state.total
    return output[:, :, : heads // kv_heads].reshape(rows, heads, head_dim).to(query.dtype)


def prefill_attention(
    query: Tensor,
    layer: Tensor,
    blocks: Tensor,
    start: int,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """A chunk of one sequence over its cached prefix and itself, causally.

    query: [tokens, heads, head_dim], the tokens at positions start, start + 1, …
    layer: [blocks, 2, kv_heads, block_size, head_dim]
    blocks: [splits * blocks per split] block ids of the sequence, padded with any valid id
    window: keys each query sees, its own included  soft_cap: scores are squeezed into ± this
    """
    tokens, heads, head_dim = query.shape
    kv_heads, block_size = layer.shape[2], layer.shape[3]
    group = heads // kv_heads
    # Rows of one KV head are (token, head in group): [kv_heads, tokens * group, head_dim].
    rows = query.float().view(tokens, kv_heads, group, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    positions = torch.arange(start, start + tokens, device=query.device).repeat_interleave(group)
    count = rows.shape[1]
    rows = pad_rows(rows)
    positions = torch.nn.functional.pad(positions, (0, rows.shape[1] - count), value=start + tokens - 1)
    state: _Running | None = None
    first_key = 0 if window is None else max(0, start - window + 1)
    for split in range(first_key // SPLIT, (start + tokens - 1) // SPLIT + 1):
        columns = blocks[split * SPLIT // block_size : (split + 1) * SPLIT // block_size]
        keys, values = _gather(layer, columns[None])
        # Rows before this split's first key see none of it. Whole tiles only, for equal bits.
        skipped = max(0, split * SPLIT - start) * group // 64 * 64
        values[..., max(0, start + tokens - split * SPLIT) :, :] = 0.0
        keys_at = torch.arange(split * SPLIT, (split + 1) * SPLIT, device=query.device)
        seen = positions[skipped:, None] >= keys_at
        if window is not None:
            seen &= positions[skipped:, None] < keys_at + window
        part = _attend(rows[:, skipped:], keys[0], values[0], seen, scale, soft_cap)
        state = part if state is None else _merge_trailing(state, part, skipped)
    assert state is not None, "a chunk has at least one token"
    output = (state.output / state.total)[:, :count]
    return output.reshape(kv_heads, tokens, group, head_dim).transpose(0, 1).reshape(query.shape).to(query.dtype)


def _gather(layer: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one split, fp32: [rows, kv_heads, SPLIT, head_dim] each."""
    rows, count = blocks.shape
    pieces = moved(layer).index_select(0, blocks.reshape(-1)).view(layer.dtype).float()
    _, _, kv_heads, block_size, head_dim = pieces.shape
    pieces = pieces.view(rows, count, 2, kv_heads, block_size, head_dim).permute(2, 0, 3, 1, 4, 5)
    keys, values = pieces.reshape(2, rows, kv_heads, count * block_size, head_dim).unbind(0)
    return keys, values


def _rows_past(table: DecodeTable, split: int, window: int | None) -> int:
    """Leading rows, the longest, whose window certainly begins after this split."""
    if window is None:
        return 0
    # Row i sees nothing of it when lengths[i] - window ≥ (split + 1) * SPLIT. `reach` tells, without
    # asking the device, how many lengths are above a multiple of SPLIT.
    above = split + 1 + -(-(window - 1) // SPLIT)
    return table.reach[above] if above < len(table.reach) else 0


def _attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, cap: float | None) -> _Running:
    """query: [..., rows, dim]  keys, values: [..., SPLIT, dim]  visible: broadcasts to [..., rows, SPLIT]."""
    scores = (query @ keys.transpose(-1, -2)) * scale
    if cap is not None:
        scores = _soft_cap(scores, cap)
    scores = scores.masked_fill(~visible, float("-inf"))
    # A row that sees nothing here has the lowest number as its maximum: exp(-inf - lowest) is its 0,
    # and it merges with another such part, or with any, without a NaN.
    maximum = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - maximum)
    return _Running(weights @ values, weights.sum(-1, keepdim=True), maximum)


def _nothing(part: _Running, rows: int) -> _Running:
    """What `rows` rows have seen before their first split."""
    output, total, maximum = (field.new_zeros((rows, *field.shape[1:])) for field in part)
    return _Running(output, total, maximum.fill_(torch.finfo(maximum.dtype).min))


def _merge(old: _Running, new: _Running) -> _Running:
    maximum = torch.maximum(old.maximum, new.maximum)
    keep, add = torch.exp(old.maximum - maximum), torch.exp(new.maximum - maximum)
    return _Running(old.output * keep + new.output * add, old.total * keep + new.total * add, maximum)


def _merge_rows(state: _Running, part: _Running, first: int) -> _Running:
    """Merge a part that concerns rows of the batch from `first` on only."""
    last = first + part.output.shape[0]
    merged = _merge(_Running(*(field[first:last] for field in state)), part)
    return _Running(*(torch.cat((old[:first], new, old[last:])) for new, old in zip(merged, state, strict=True)))


def _merge_trailing(state: _Running, part: _Running, skipped: int) -> _Running:
    """Merge a part that concerns the rows from `skipped` on only."""
    merged = _merge(_Running(*(field[:, skipped:] for field in state)), part)
    return _Running(*(torch.cat((old[:, :skipped], new), dim=1) for new, old in zip(merged, state, strict=True)))
