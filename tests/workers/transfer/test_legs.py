"""Which device gives which heads to which: every head once, from one that has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from diptych.errors import LayoutMismatch
from diptych.types import KvLayout
from workers.transfer.legs import match_legs, narrower

WHOLE = KvLayout(layers=2, kv_heads=8, block_size=16, head_dim=64, dtype="bf16")
SHARDS = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("there", SHARDS)
@pytest.mark.parametrize("here", SHARDS)
def test_every_head_of_every_shard_comes_once_from_one_that_has_it(there: int, here: int) -> None:
    source, target = replace(WHOLE, shards=there), replace(WHOLE, shards=here, block_size=32)
    legs = match_legs(source, target)
    for shard in target.all_shards():
        into = [leg for leg in legs if leg.target == shard.shard]
        heads = [head for leg in into for head in range(leg.first_head, leg.first_head + leg.heads)]
        assert heads == list(shard.heads)
        for leg in into:
            held = source.all_shards()[leg.source].heads
            assert leg.first_head in held
            assert leg.first_head + leg.heads - 1 in held


def test_shards_with_the_same_head_share_the_work() -> None:
    legs = match_legs(replace(WHOLE, shards=16), replace(WHOLE, shards=16))
    assert {leg.source for leg in legs} == set(range(16))


def test_a_shard_is_a_part_of_its_block() -> None:
    quarter = replace(WHOLE, shard=3, shards=4)
    assert (quarter.heads, quarter.block_shape) == (range(6, 8), (2, 2, 2, 16, 64))
    assert quarter.block_bytes * 4 == WHOLE.block_bytes
    assert replace(WHOLE, shard=31, shards=32).heads == range(7, 8)
    assert quarter != replace(quarter, shard=2)


@pytest.mark.parametrize(("shard", "shards"), [(2, 2), (-1, 2), (0, 3), (0, 12)])
def test_heads_that_can_not_be_shared_out_are_refused(shard: int, shards: int) -> None:
    with pytest.raises(ValueError, match=rf"shard {shard} of {shards} does not share 8 KV heads out"):
        replace(WHOLE, shard=shard, shards=shards)


@pytest.mark.parametrize("other", [{"layers": 3}, {"kv_heads": 4}, {"head_dim": 32}, {"dtype": "fp8"}])
def test_another_models_layout_is_refused_by_both_names(other: dict[str, Any]) -> None:
    with pytest.raises(LayoutMismatch) as refused:
        match_legs(WHOLE, replace(WHOLE, **other))
    assert str(WHOLE) in str(refused.value)
    assert str(replace(WHOLE, **other)) in str(refused.value)


def test_the_wire_keeps_what_both_sides_could_keep() -> None:
    single, narrow = replace(WHOLE, dtype="fp32"), replace(WHOLE, dtype="fp8")
    assert [narrower(a, b) for a in (single, WHOLE) for b in (single, WHOLE)] == ["fp32", "bf16", "bf16", "bf16"]
    assert narrower(narrow, narrow) == "fp8"


def test_a_block_takes_the_bytes_of_its_numbers() -> None:
    numbers = {"fp32": 4, "bf16": 2, "fp8": 1}
    assert {dtype: replace(WHOLE, dtype=dtype).block_bytes for dtype in numbers} == {
        dtype: 2 * 2 * 8 * 16 * 64 * width for dtype, width in numbers.items()
    }
