"""The block pool: exact orders on hand-made histories."""

from __future__ import annotations

import pytest

from diptych.types import BlockHash, BlockId, Evicted, Stored
from workers.engine.blocks import BlockPool


def names(text: str) -> list[BlockHash]:
    return [BlockHash(letter.encode()) for letter in text]


def fill(pool: BlockPool, chain: str, owner: str) -> list[BlockId]:
    """`owner` reuses what is here of `chain`, computes the rest and names it."""
    hashes = names(chain)
    blocks = pool.acquire(hashes, owner)
    rest = pool.take(len(hashes) - len(blocks), owner)
    assert rest is not None
    for block, name in zip(rest, hashes[len(blocks) :], strict=True):
        pool.name(block, name, owner)
    pool.check()
    return blocks + rest


def counts(pool: BlockPool) -> tuple[int, int, int, int, int]:
    pool.check()
    return (pool.free, pool.cached, pool.held, pool.granted, pool.lent)


def test_a_released_chain_is_evicted_from_its_leaf() -> None:
    pool = BlockPool(3)
    assert fill(pool, "abc", "r1") == [0, 1, 2]
    assert pool.release("r1") == 3
    assert pool.take(2, "r2") == [2, 1]
    assert pool.match(names("abc")) == 1


def test_the_chain_unused_for_longest_goes_first() -> None:
    pool = BlockPool(4)
    fill(pool, "ab", "r1")
    fill(pool, "xy", "r2")
    pool.release("r1")
    pool.release("r2")
    fill(pool, "a", "r3")
    pool.release("r3")
    assert pool.take(4, "r4") == [1, 3, 2, 0]


def test_free_blocks_go_before_anything_is_evicted() -> None:
    pool = BlockPool(4)
    fill(pool, "ab", "r1")
    pool.release("r1")
    assert pool.take(2, "r2") == [2, 3]
    assert pool.match(names("ab")) == 2


def test_too_large_a_take_changes_nothing() -> None:
    pool = BlockPool(3)
    fill(pool, "ab", "r1")
    pool.release("r1")
    pool.take(1, "r2")
    assert pool.take(3, "r3") is None
    assert counts(pool) == (0, 2, 1, 0, 0)
    assert pool.owners() == ("r2",)


def test_a_shared_prefix_stays_until_its_last_owner_leaves() -> None:
    pool = BlockPool(4)
    fill(pool, "abc", "r1")
    assert fill(pool, "abd", "r2") == [0, 1, 3]
    pool.release("r1")
    assert counts(pool) == (0, 1, 3, 0, 0)
    pool.release("r2")
    assert pool.take(4, "r3") == [2, 3, 1, 0]


def test_the_second_block_of_a_name_stays_anonymous_and_goes_free() -> None:
    pool = BlockPool(2)
    first, second = pool.take(1, "r1"), pool.take(1, "r2")
    assert first is not None
    assert second is not None
    assert pool.name(first[0], names("a")[0], "r1")
    assert not pool.name(second[0], names("a")[0], "r2")
    pool.release("r2")
    assert counts(pool) == (1, 0, 1, 0, 0)


def test_an_unfinished_block_has_nothing_to_keep() -> None:
    pool = BlockPool(2)
    pool.take(2, "r1")
    pool.release("r1")
    assert counts(pool) == (2, 0, 0, 0, 0)


def test_a_landed_grant_is_held_by_the_request() -> None:
    pool = BlockPool(4)
    fill(pool, "a", "r0")
    pool.release("r0")
    assert pool.acquire(names("ab"), "r1") == [0]
    assert pool.grant(2, "t1") == [1, 2]
    assert counts(pool) == (1, 0, 1, 2, 0)
    assert pool.commit("t1", "r1") == [1, 2]
    assert counts(pool) == (1, 0, 3, 0, 0)
    assert pool.blocks_of("r1") == [0, 1, 2]


def test_an_expired_grant_goes_free() -> None:
    pool = BlockPool(2)
    pool.grant(2, "t1")
    assert pool.release("t1") == 2
    assert pool.release("t1") == 0
    assert counts(pool) == (2, 0, 0, 0, 0)


def test_a_granted_block_cannot_be_named() -> None:
    pool = BlockPool(1)
    pool.grant(1, "t1")
    with pytest.raises(AssertionError, match="not committed"):
        pool.name(BlockId(0), names("a")[0], "t1")


def test_a_request_that_waits_for_its_hand_off_lends_its_blocks() -> None:
    pool = BlockPool(3)
    fill(pool, "ab", "r1")
    pool.lend("r1")
    assert counts(pool) == (1, 0, 0, 0, 2)
    fill(pool, "a", "r2")
    assert counts(pool) == (1, 0, 1, 0, 1)
    pool.release("r1")
    pool.release("r2")
    assert counts(pool) == (1, 2, 0, 0, 0)


def test_a_block_taken_again_is_of_a_new_generation() -> None:
    pool = BlockPool(1)
    fill(pool, "a", "r1")
    before = pool.generation(BlockId(0))
    pool.release("r1")
    pool.acquire(names("a"), "r2")
    assert pool.generation(BlockId(0)) == before
    pool.release("r2")
    pool.grant(1, "t1")
    assert pool.generation(BlockId(0)) == before + 1


def test_events_tell_the_net_change_once() -> None:
    pool = BlockPool(2)
    fill(pool, "ab", "r1")
    assert pool.events() == [Stored(tuple(names("ab")))]
    assert pool.events() == []
    pool.release("r1")
    fill(pool, "xy", "r2")
    assert pool.events() == [Evicted(tuple(names("ba"))), Stored(tuple(names("xy")))]


def test_events_do_not_tell_what_came_and_went_in_between() -> None:
    pool = BlockPool(1)
    fill(pool, "a", "r1")
    pool.events()
    for chain in ("b", "a"):
        pool.release("r1")
        fill(pool, chain, "r1")
    assert pool.events() == []


def test_clear_forgets_what_is_cached_and_keeps_what_is_in_use() -> None:
    pool = BlockPool(3)
    fill(pool, "ab", "r1")
    fill(pool, "ac", "r2")
    pool.release("r1")
    pool.clear()
    assert counts(pool) == (1, 0, 2, 0, 0)
    assert set(pool.snapshot()) == set(names("ac"))


def test_reuse_ends_at_the_first_name_that_is_gone() -> None:
    pool = BlockPool(2)
    blocks = fill(pool, "ab", "r1")
    pool.release_blocks(blocks[:1], "r1")
    pool.clear()
    assert pool.snapshot() == tuple(names("b"))
    assert pool.match(names("ab")) == 0
    assert pool.acquire(names("ab"), "r2") == []
    assert counts(pool) == (1, 0, 1, 0, 0)


def test_some_of_an_owners_blocks_can_go_back_early() -> None:
    pool = BlockPool(4)
    blocks = fill(pool, "abc", "r1")
    pool.release_blocks(blocks[1:], "r1")
    assert counts(pool) == (1, 2, 1, 0, 0)
    pool.release_blocks(blocks[:1], "r1")
    assert pool.owners() == ()
    assert counts(pool) == (1, 3, 0, 0, 0)
