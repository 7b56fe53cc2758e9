"""Paged attention against torch's own, and its bits against themselves: no batch, chunk or padding shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import DecodeTable, decode_attention, prefill_attention

SPLIT, BLOCK, DIM = 256, 16, 32
EDGES = (1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 700)


class Cache:
    """One sequence of 700 tokens in an arena of scattered blocks, with garbage in all the others."""

    def __init__(self, kv_heads: int, group: int, length: int = 700) -> None:
        random = torch.Generator().manual_seed(kv_heads * 10 + group)
        self.length = length
        self.arena = torch.randn(200, 2, kv_heads, BLOCK, DIM, generator=random)
        wanted = -(-length // SPLIT) * SPLIT // BLOCK
        self.blocks = torch.randperm(200, generator=random)[:wanted]
        self.query = torch.randn(length, kv_heads * group, DIM, generator=random)
        self.whole = prefill_attention(self.query, self.arena, self.blocks, 0, DIM**-0.5)

    def chunk(self, start: int, end: int) -> Tensor:
        splits = -(-end // SPLIT) * SPLIT // BLOCK
        return prefill_attention(self.query[start:end], self.arena, self.blocks[:splits], start, DIM**-0.5)

    def decoded(self, lengths: list[int], pad: int = 0) -> Tensor:
        """The last token of each prefix, in one batch; blocks that are not needed are `pad`."""
        reach = tuple(sum(length > at for length in lengths) for at in range(0, lengths[0], SPLIT))
        columns = len(reach) * SPLIT // BLOCK
        rows = []
        for length in lengths:
            needed = -(-length // BLOCK)
            rows.append(torch.cat((self.blocks[:needed], torch.full((columns - needed,), pad))))
        table = DecodeTable(torch.stack(rows), torch.tensor(lengths), reach)
        return decode_attention(self.query[[length - 1 for length in lengths]], self.arena, table, DIM**-0.5)


@pytest.fixture(params=[(3, 3), (2, 1)], ids=["3x3 heads", "2x1 heads"], scope="module")
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(*request.param)


def reference(cache: Cache) -> Tensor:
    """torch's attention over the same keys and values, laid out flat: [tokens, heads, dim]."""
    flat = cache.arena[cache.blocks].permute(1, 2, 0, 3, 4)
    keys, values = flat.reshape(2, flat.shape[1], -1, DIM)[:, :, : cache.length]
    group = cache.query.shape[1] // len(keys)
    return torch.nn.functional.scaled_dot_product_attention(
        cache.query.transpose(0, 1)[None],
        keys.repeat_interleave(group, 0)[None],
        values.repeat_interleave(group, 0)[None],
        is_causal=True,
    )[0].transpose(0, 1)


def test_it_is_attention(cache: Cache) -> None:
    torch.testing.assert_close(cache.whole, reference(cache), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 3, 255, 256, 257])
@pytest.mark.parametrize("end", [5, 256, 257, 513, 700])
def test_a_chunk_has_the_bits_of_the_whole(cache: Cache, start: int, end: int) -> None:
    if start < end:
        assert torch.equal(cache.chunk(start, end), cache.whole[start:end])


@pytest.mark.parametrize(
    "lengths", [[length] for length in EDGES] + [[700, 513, 512, 257, 256, 255, 17, 1], [257, 256]]
)
def test_a_decoded_token_has_the_bits_of_the_prefilled_one(cache: Cache, lengths: list[int]) -> None:
    assert torch.equal(cache.decoded(lengths), cache.whole[[length - 1 for length in lengths]])


def test_what_pads_a_table_does_not_show(cache: Cache) -> None:
    lengths = [700, 300, 5]
    assert torch.equal(cache.decoded(lengths, pad=0), cache.decoded(lengths, pad=199))


@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
@pytest.mark.parametrize("length", [1, 16, 17, 255, 257, 300])
def test_what_lies_past_the_end_does_not_show(garbage: float, length: int) -> None:
    clean, dirty = Cache(2, 2), Cache(2, 2)
    blocks, rest = divmod(length, BLOCK)
    if rest:
        dirty.arena[dirty.blocks[blocks], :, :, rest:] = garbage
    others = [block for block in range(200) if block not in dirty.blocks[: -(-length // BLOCK)].tolist()]
    dirty.arena[others] = garbage
    assert torch.equal(dirty.decoded([length], pad=others[0]), clean.whole[length - 1 : length])
    assert torch.equal(dirty.chunk(0, length), clean.whole[:length])
    if length > 1:
        assert torch.equal(dirty.chunk(length // 2, length), clean.whole[length // 2 : length])


def test_scores_and_sums_of_a_bf16_cache_are_fp32() -> None:
    cache = Cache(2, 2)
    half = cache.arena.bfloat16()
    exact = prefill_attention(cache.query, half.float(), cache.blocks, 0, DIM**-0.5)
    query = cache.query.bfloat16()
    rounded = prefill_attention(query, half, cache.blocks, 0, DIM**-0.5)
    again = prefill_attention(query.float(), half.float(), cache.blocks, 0, DIM**-0.5)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, again.bfloat16())
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("window", [1, 255, 256, 300])
def test_a_window_hides_what_lies_before_it(cache: Cache, window: int) -> None:
    length = cache.length
    splits = cache.blocks
    windowed = prefill_attention(cache.query, cache.arena, splits, 0, DIM**-0.5, window=window)
    flat = cache.arena[cache.blocks].permute(1, 2, 0, 3, 4)
    keys, values = flat.reshape(2, flat.shape[1], -1, DIM)[:, :, :length]
    at = torch.arange(length)
    seen = (at[:, None] >= at) & (at[:, None] - at < window)
    group = cache.query.shape[1] // len(keys)
    expected = torch.nn.functional.scaled_dot_product_attention(
        cache.query.transpose(0, 1)[None],
        keys.repeat_interleave(group, 0)[None],
        values.repeat_interleave(group, 0)[None],
        attn_mask=seen,
    )[0].transpose(0, 1)
    torch.testing.assert_close(windowed, expected, rtol=1e-4, atol=1e-5)
    alone = prefill_attention(cache.query[600:], cache.arena, splits, 600, DIM**-0.5, window=window)
    assert torch.equal(alone, windowed[600:])


_BITS = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
from test_attention import Cache
from kernels import linear
cache = Cache(3, 3)
bad = [edge for edge in (1, 5, 256, 257, 700) if not torch.equal(cache.decoded([edge]), cache.whole[edge - 1 : edge])]
bad += [edge for edge in (3, 256, 300) if not torch.equal(cache.chunk(edge, 700), cache.whole[edge:])]
x, weight = torch.randn(300, 576), torch.randn(192, 576)
whole = linear(x, weight)
bad += [rows for rows in (1, 2, 3, 5, 8, 33, 250) if not torch.equal(linear(x[:rows], weight), whole[:rows])]
assert not bad, bad
print(hashlib.sha256(cache.whole.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_in_one_and_in_two_threads_bits_do_not_depend_on_the_batch() -> None:
    here = Path(__file__).parent
    for threads in ("1", "2"):
        command = [sys.executable, "-c", _BITS, threads, str(here)]
        ran = subprocess.run(command, cwd=here.parents[1], capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stderr
