"""What yields first when a pool is full: after a while, what was learned to be used least."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from diptych.types import BlockHash
from workers.engine.blocks import BlockPool
from workers.engine.reuse_odds import ReuseOdds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.types import Eviction

EVICTIONS: tuple[Eviction, ...] = ("lru", "reuse")
SIZE = 256


def chain(*parts: tuple[str, int]) -> list[BlockHash]:
    return [BlockHash(f"{name}/{place}".encode()) for name, length in parts for place in range(length)]


def serve(pool: BlockPool, names: list[BlockHash], owner: str = "r") -> int:
    """How many blocks were there."""
    here = pool.acquire(names, owner)
    new = pool.take(len(names) - len(here), owner)
    assert new is not None
    for block, name in zip(new, names[len(here) :], strict=True):
        pool.name(block, name, owner)
    pool.release(owner)
    return len(here)


def sessions_among_one_offs(seed: int) -> Iterator[list[BlockHash]]:
    """Eight sessions speak in any order, each turn followed by three prompts that nobody repeats."""
    random = Random(seed)
    for turn in range(600):
        session = f"{random.randrange(8)}.{turn // 80}"
        yield chain(("system", 2), (f"session {session}", 4 + turn % 80 // 8))
        for _ in range(3):
            yield chain(("system", 2), (f"one-off {random.random()}", 12))


@pytest.mark.parametrize("seed", range(3))
def test_of_what_recency_loses_of_sessions_most_is_kept(seed: int) -> None:
    """Against a pool in which everything fits."""
    pools = {"all": BlockPool(64 * SIZE), **{each: BlockPool(SIZE, eviction=each) for each in EVICTIONS}}
    hits = {name: sum(serve(pool, names) for names in sessions_among_one_offs(seed)) for name, pool in pools.items()}
    print(f"\nblocks found: {hits}")
    assert hits["all"] - hits["reuse"] < 0.5 * (hits["all"] - hits["lru"])


def test_a_loop_over_more_than_fits_is_no_worse_than_by_recency() -> None:
    hits = {
        eviction: sum(serve(pool, chain((f"document {each % 30}", 10))) for each in range(1_500))
        for eviction, pool in ((each, BlockPool(SIZE, eviction=each)) for each in EVICTIONS)
    }
    assert hits["reuse"] >= hits["lru"]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_no_block_outlives_the_one_it_hangs_from(eviction: Eviction) -> None:
    random, pool = Random(1), BlockPool(SIZE, eviction=eviction)
    parents: dict[BlockHash, BlockHash | None] = {}
    for turn in range(2_000):
        names = branching(random, parents)
        owner = f"r{turn % 5}"
        pool.release(owner)
        new = pool.take(len(names) - len(pool.acquire(names, owner)), owner)
        assert new is not None
        for block, name in zip(new, names[len(names) - len(new) :], strict=True):
            pool.name(block, name, owner)
        if turn % 10 == 0:
            pool.check()
            cached = set(pool.snapshot())
            assert all(parents[name] in cached for name in cached if parents[name] is not None)


def branching(random: Random, parents: dict[BlockHash, BlockHash | None]) -> list[BlockHash]:
    """A path of up to 18 blocks from one root; `parents` learns it."""
    path = ""
    names: list[BlockHash] = []
    for depth in range(random.randint(1, 18)):
        path += str(random.randrange(3 if depth < 4 else 2))
        names.append(BlockHash(path.encode()))
        parents[names[-1]] = names[-2] if depth else None
    return names


def test_the_same_history_ends_in_the_same_blocks() -> None:
    def left() -> tuple[BlockHash, ...]:
        pool = BlockPool(SIZE, eviction="reuse")
        for names in sessions_among_one_offs(7):
            serve(pool, names)
        return pool.snapshot()

    assert left() == left()


def test_before_anything_was_learned_the_order_is_recency() -> None:
    pools = [BlockPool(8, eviction=eviction) for eviction in EVICTIONS]
    for pool in pools:
        for name in "abacad":
            serve(pool, chain((name, 2)))
    assert pools[0].take(8, "all") == pools[1].take(8, "all")


def test_what_is_remembered_stays_bounded() -> None:
    pool = BlockPool(64, eviction="reuse")
    for number in range(3_000):
        serve(pool, chain((f"prompt {number}", 5)))
    pool.check()
    assert pool.cached == 64 - pool.free


def test_what_was_used_soon_ranks_above_what_never_was() -> None:
    odds = ReuseOdds(classes=2, size=1024)
    for now in range(4096):
        odds.began(0, now)
        odds.used(0, now, now + 100)
        odds.began(1, now)
        odds.lost(1, now, now + 1000)
    odds.learn(4096)
    assert odds.index is not None
    age = (50).bit_length()
    assert odds.index[0][age] > 5 * odds.index[1][age]
    assert all(a >= 0.0 for row in odds.index for a in row)
