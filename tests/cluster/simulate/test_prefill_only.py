"""Placement alone reproduces the published reference points over the real block pool."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest

from cluster.simulate.compare import POLICIES
from cluster.simulate.constants import Constants, Placement
from cluster.simulate.ours import Ours
from cluster.simulate.prefill_only import bound, place_all
from cluster.simulate.readers import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cluster.simulate.prefill_only import Placed
    from cluster.simulate.trace import Trace
    from diptych.types import Eviction

TRACE = "traces/mooncake_conversation.jsonl"
# As placement_bound.py prints them: hit rate in percent, max/mean work, delay p50 and p99 in seconds.
REFERENCE = {
    (5_000, "round_robin"): (12.1, 1.01, 2.5, 17.1),
    (5_000, "queue_plus_uncached"): (24.5, 1.02, 1.1, 7.6),
    (20_000, "round_robin"): (18.3, 1.01, 2.0, 15.7),
    (20_000, "queue_plus_uncached"): (31.7, 1.02, 0.8, 7.0),
}
QUICK = (5_000, "queue_plus_uncached")


@cache
def trace(file: Path) -> Trace:
    return read_trace(str(file))


def blocks(count: int) -> Constants:
    return Constants(placement=Placement(blocks=count))


@pytest.mark.parametrize(
    ("count", "policy"),
    [pytest.param(*key, marks=[] if key == QUICK else pytest.mark.full) for key in REFERENCE],
)
def test_the_reference_points_come_out_of_our_pool(count: int, policy: str, shared: Callable[[str], Path]) -> None:
    placed = place_all(trace(shared(TRACE)), blocks(count), POLICIES[policy]())
    print(f"\n{count:,} blocks: {placed}")
    assert figures(placed) == REFERENCE[count, policy]


@pytest.mark.full
@pytest.mark.parametrize(("count", "hits"), [(5_000, 28.8), (20_000, 36.2)])
def test_the_bound_is_one_pool_of_all_blocks(count: int, hits: float, shared: Callable[[str], Path]) -> None:
    """With plain recency; a better eviction is above it."""
    placed = bound(trace(shared(TRACE)), blocks(count), POLICIES["round_robin"]())
    assert round(100 * placed.hit_rate, 1) >= hits


@pytest.mark.full
@pytest.mark.parametrize(
    ("count", "eviction", "hits", "p99"),
    [(5_000, "lru", 28.5, 7.7), (5_000, "reuse", 29.5, 7.7), (20_000, "lru", 36.0, 7.1), (20_000, "reuse", 36.0, 7.1)],
)
def test_ours_has_nearly_the_hits_of_one_pool_and_even_work(
    count: int, eviction: Eviction, hits: float, p99: float, shared: Callable[[str], Path]
) -> None:
    placed = place_all(trace(shared(TRACE)), blocks(count), Ours(queues=False), eviction)
    print(f"\n{count:,} blocks: {placed}")
    hit_rate, imbalance, _, delay_p99 = figures(placed)
    assert hit_rate >= hits
    assert delay_p99 <= p99
    assert imbalance <= 1.05


def test_ours_borrows_nothing_where_there_are_no_links(conversations: Trace) -> None:
    placed = place_all(conversations, blocks(1000), Ours(queues=False))
    assert placed.hit_rate > 0.5


def figures(placed: Placed) -> tuple[float, float, float, float]:
    delays = (round(delay, 1) for delay in (placed.delay_p50, placed.delay_p99))
    return (round(100 * placed.hit_rate, 1), round(placed.imbalance, 2), *delays)
