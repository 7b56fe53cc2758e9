"""Attention on a GPU against its meaning: `kernels.reference.attention` of the same cache, in fp32."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

from kernels.gpu.decode_attention import decode_attention, split_count
from kernels.gpu.paged import Look, PagedRows, RowTiles, row_tiles
from kernels.gpu.prefill_attention import prefill_attention
from kernels.reference import attention as reference
from kernels.reference.fp8 import FP8

SPLIT = reference.SPLIT
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Heads(NamedTuple):
    kv: int
    group: int
    dim: int


HEADS = [Heads(2, 4, 64), Heads(1, 3, 16), Heads(2, 1, 80), Heads(1, 8, 128)]
LOOKS = [Look(0.125), Look(0.2, window=24), Look(0.3, soft_cap=5.0), Look(0.2, window=100, soft_cap=20.0)]
each_heads = pytest.mark.parametrize("heads", HEADS, ids=str)
each_look = pytest.mark.parametrize("look", LOOKS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Cache:
    """Sequences in scattered blocks of the second of three layers, with NaN wherever no key lies."""

    def __init__(self, heads: Heads, lengths: list[int], dtype: torch.dtype, block_size: int = 16) -> None:
        random = torch.Generator().manual_seed(1)
        needed = [-(-length // block_size) for length in lengths]
        blocks = sum(needed) + 3
        arena = torch.randn(blocks, 3, 2, heads.kv, block_size, heads.dim, generator=random).to(dtype)
        order = torch.randperm(blocks, generator=random).tolist()
        self.tables: list[list[int]] = []
        for length, count in zip(lengths, needed, strict=True):
            self.tables.append([order.pop() for _ in range(count)])
            if length % block_size:
                arena[self.tables[-1][-1], :, :, :, length % block_size :] = torch.nan
        arena[order] = torch.nan
        self.arena, self.block_size = arena, block_size

    @property
    def layer(self) -> Tensor:
        return self.arena[:, 1]

    def rows(self, segments: list[tuple[int, int, int]], device: torch.device) -> PagedRows:
        """segments: (sequence, position of its first row, rows)"""
        starts = [sum(map(len, self.tables[:sequence])) for sequence in range(len(self.tables))]
        positions = [start + at for _, start, count in segments for at in range(count)]
        of_rows = [starts[sequence] for sequence, _, count in segments for _ in range(count)]
        ids = [block for table in self.tables for block in table]
        return PagedRows(*(torch.tensor(each, dtype=torch.int32, device=device) for each in (positions, of_rows, ids)))

    def padded(self, sequence: int) -> Tensor:
        """As the reference wants it: whole splits."""
        table = self.tables[sequence]
        per_split = SPLIT // self.block_size
        return torch.tensor(table + table[:1] * (-len(table) % per_split))

    def wanted(self, query: Tensor, sequence: int, start: int, look: Look) -> Tensor:
        return reference.prefill_attention(
            query.float(), self.layer.float(), self.padded(sequence), start, look.scale,
            window=look.window, soft_cap=look.soft_cap,
        )  # fmt: skip


def queries(rows: int, heads: Heads, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, heads.kv * heads.group, heads.dim, generator=torch.Generator().manual_seed(2)).to(dtype)


@each_heads
@each_look
@each_dtype
@pytest.mark.parametrize("splits", [1, 4])
def test_decoding_is_attention(device: torch.device, heads: Heads, look: Look, dtype: torch.dtype, splits: int) -> None:
    lengths = [1, 16, 65, 130, 300]
    cache, query = Cache(heads, lengths, dtype), queries(len(lengths), heads, dtype)
    rows = cache.rows([(sequence, length - 1, 1) for sequence, length in enumerate(lengths)], device)
    found = decode_attention(query.to(device), cache.layer.to(device), rows, look, splits).cpu()
    for sequence, length in enumerate(lengths):
        wanted = cache.wanted(query[sequence : sequence + 1], sequence, length - 1, look)
        torch.testing.assert_close(found[sequence : sequence + 1].float(), wanted, atol=NEAR[dtype], rtol=NEAR[dtype])


@each_heads
@each_look
@each_dtype
@pytest.mark.parametrize("tile", [64, 128])
def test_prefill_is_attention(device: torch.device, heads: Heads, look: Look, dtype: torch.dtype, tile: int) -> None:
    lengths, starts = [150, 7, 200, 81], [0, 3, 64, 80]
    cache = Cache(heads, lengths, dtype)
    counts = [length - start for length, start in zip(lengths, starts, strict=True)]
    query = queries(sum(counts), heads, dtype)
    first_rows = [sum(counts[:sequence]) for sequence in range(len(counts))]
    rows = cache.rows(list(zip(range(4), starts, counts, strict=True)), device)
    cut = torch.as_tensor(row_tiles(list(zip(first_rows, counts, starts, strict=True)), tile), device=device)
    out = torch.full_like(query, torch.nan, device=device)
    prefill_attention(query.to(device), cache.layer.to(device), rows, RowTiles(cut, tile), look, out)
    for sequence, (first, count, start) in enumerate(zip(first_rows, counts, starts, strict=True)):
        wanted = cache.wanted(query[first : first + count], sequence, start, look)
        found = out[first : first + count].float().cpu()
        torch.testing.assert_close(found, wanted, atol=NEAR[dtype], rtol=NEAR[dtype])


@pytest.mark.parametrize("splits", [1, 8])
def test_rows_that_pad_a_batch_get_zeros_and_touch_nobody(device: torch.device, splits: int) -> None:
    heads, look = HEADS[0], LOOKS[0]
    cache, query = Cache(heads, [40], torch.float32), queries(3, heads, torch.float32)
    rows = cache.rows([(0, 39, 1), (0, -1, 1), (0, 39, 1)], device)
    found = decode_attention(query.to(device), cache.layer.to(device), rows, look, splits).cpu()
    assert not found[1].any()
    for row in (0, 2):
        wanted = cache.wanted(query[row : row + 1], 0, 39, look)
        torch.testing.assert_close(found[row : row + 1], wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("block_size", [32, 256])
def test_blocks_may_be_larger_than_a_tile_of_keys(device: torch.device, block_size: int) -> None:
    heads, look = HEADS[0], LOOKS[0]
    cache, query = Cache(heads, [300], torch.float32, block_size), queries(1, heads, torch.float32)
    rows = cache.rows([(0, 299, 1)], device)
    found = decode_attention(query.to(device), cache.layer.to(device), rows, look, 2).cpu()
    torch.testing.assert_close(found, cache.wanted(query, 0, 299, look), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tile", [0, 64, 128], ids=lambda tile: f"prefill {tile}" if tile else "decode")
def test_a_cache_in_fp8_is_read_as_its_numbers(device: torch.device, tile: int) -> None:
    """To the bit: what was read is widened before anything is computed."""
    heads, look = HEADS[0], LOOKS[1]
    cache = Cache(heads, [90], torch.bfloat16)
    narrow = cache.layer.to(FP8)
    assert narrow.float().isnan().any(), "and what lies beyond the end is not read"
    said: list[Tensor] = []
    for layer in (narrow.to(device), narrow.to(torch.bfloat16).to(device)):
        if tile:
            query, rows = queries(90, heads, torch.bfloat16).to(device), cache.rows([(0, 0, 90)], device)
            cut = torch.as_tensor(row_tiles([(0, 90, 0)], tile), device=device)
            out = torch.full_like(query, torch.nan)
            prefill_attention(query, layer, rows, RowTiles(cut, tile), look, out)
        else:
            query, rows = queries(1, heads, torch.bfloat16).to(device), cache.rows([(0, 89, 1)], device)
            out = decode_attention(query, layer, rows, look, 2)
        said.append(out.cpu())
    assert said[0].isfinite().all()
    assert torch.equal(*said)


def test_what_is_not_finite_in_a_seen_key_shows(device: torch.device) -> None:
    """The engine fails a sequence by it; a maximum that skips NaN would hide it."""
    heads, look = HEADS[0], LOOKS[0]
    cache, query = Cache(heads, [90], torch.float32), queries(1, heads, torch.float32)
    cache.arena[cache.tables[0][2], 1, 0, :, 5] = torch.nan
    rows = cache.rows([(0, 89, 1)], device)
    found = decode_attention(query.to(device), cache.layer.to(device), rows, look, 4).cpu()
    assert found.isnan().all()


@pytest.mark.parametrize(
    ("rows", "kv_heads", "splits"), [(1, 8, 64), (8, 8, 16), (64, 8, 2), (256, 8, 1), (1, 1, 64), (1000, 8, 1)]
)
def test_splits_fill_the_device(rows: int, kv_heads: int, splits: int) -> None:
    assert split_count(rows, kv_heads, processors=132) == splits


def test_tiles_cover_every_row_once_and_start_with_the_most_keys() -> None:
    tiles = row_tiles([(0, 130, 0), (130, 1, 500), (131, 64, 64)], 64)
    assert tiles.tolist() == [[130, 1], [128, 2], [64, 64], [131, 64], [0, 64]]
