"""The C++ pricing beside numpy's: the same choice for the same costs, to the last bit, in any state of a cluster."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cluster.scheduler.backlog import RANKS
from cluster.scheduler.costs import Asked, Estimate
from cluster.scheduler.fleet import Fleet
from cluster.scheduler.native_pricing import fastest_pricing, native_pricing
from cluster.scheduler.pricing import Priced, price_by_numpy
from diptych.compiling import NoLibrary
from diptych.types import Role

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.scheduler.costs import Rule
    from cluster.scheduler.pricing import Pricing

RATES = ("token_seconds", "pair_seconds", "row_seconds", "context_seconds", "beside_seconds")
LINKS = ("fetch_seconds", "fetch_token_seconds", "exposed_seconds", "exposed_token_seconds")
LOADS = ("rows", "context_tokens", "tie", "idle_at")
ODD = (float("inf"), float("nan"), 0.0)
HOWS: tuple[Rule, ...] = ("auto", "remote", "local")
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Pricing:
    try:
        return native_pricing(tmp_path_factory.mktemp("native"))
    except NoLibrary as error:
        pytest.skip(f"no C++ here: {error}")


def some_fleet(drawn: random.Random, workers: int, *, tied: bool, odd: bool) -> Fleet:
    """`tied`: numbers are few, so that costs are equal; `odd`: some are infinite or none at all."""
    fleet = Fleet()
    hosts, roles = (
        drawn.choice((1, 2, max(1, workers // 2), 2 * workers + 1)),
        drawn.choice((ROLES, ROLES[:2], ROLES[1:], ROLES[2:], ROLES[:1], ROLES[1:2])),
    )
    sizes = drawn.choice(((16,), (16,), (16, 32, 64)))
    for slot in drawn.sample(range(workers + 3), workers):
        fleet.vacate(slot)
        fleet.block_tokens[slot] = drawn.choice(sizes)
        fleet.most_tokens[slot] = drawn.choice((1 << 20, 1 << 20, 1000))
        fleet.settle(slot, float(drawn.randrange(hosts)))
        state = drawn.random()
        fleet.open(slot, drawn.choice(roles), placeable=state < 0.8, alive=state < 0.9)

    def number(scale: float) -> float:
        if odd and drawn.random() < 0.02:
            return drawn.choice(ODD)
        return scale * (drawn.choice((1.0, 2.0)) if tied else drawn.lognormvariate(0.0, 1.0))

    for name, scale in (*((name, 1e-4) for name in (*RATES, *LINKS)), *((name, 3.0) for name in LOADS)):
        column = getattr(fleet, name)
        column.flat = [number(scale) for _ in range(column.size)]
    fleet.room_tokens[:] = [number(drawn.choice((1e5, 1e3))) - 500 for _ in range(len(fleet))]
    fleet.saw_step(drawn.randrange(len(fleet)), drawn.choice((0.0, 256.0)))
    kinds = random.Random(workers)
    for column in (fleet.step_seconds, fleet.kind_step_seconds, fleet.kind_token_seconds, fleet.kind_pair_seconds):
        column.flat = [kinds.choice((1e-4, 2e-4, 3e-3)) for _ in range(column.size)]
    return fleet


def some_request(drawn: random.Random, fleet: Fleet, now: float) -> Asked:
    tokens = drawn.choice((1, 16, 64, 1000, 1605))

    def depths(most: int) -> list[tuple[int, int]]:
        reach = [16 * drawn.randrange(1, 2 + most // 16) for _ in range(drawn.randrange(4))]
        return [(depth, drawn.getrandbits(len(fleet)) & drawn.getrandbits(len(fleet))) for depth in reach]

    return Asked(
        prompt_tokens=tokens,
        context=tokens + drawn.choice((100, 1 << 19)),
        answer_tokens=drawn.choice((1.0, 2.0, 137.25)),
        held=[(depth, holders) for depth, holders in depths(tokens) if holders],
        promised=[(depth, holders) for depth, holders in depths(tokens) if holders],
        rank=drawn.randrange(RANKS),
        now=now,
        ttft_seconds=drawn.choice((None, 0.01, 3.0)),
        itl_seconds=drawn.choice((None, 1e-4, 3.0)),
        usual_seconds=drawn.choice((None, 0.5, 3.0)),
        late={"local": drawn.choice((0.0, -0.1)), "mixed": drawn.choice((0.0, 0.1)), "remote": 0.0},
        how=drawn.choice(HOWS),
    )


def assert_same(ours: Priced | None, meant: Priced | None) -> None:
    if meant is None or ours is None:
        assert ours is meant
        return
    assert repr(ours._replace(costs=meant.costs)) == repr(meant)
    for column in fields(Estimate):
        mine, theirs = (getattr(one.costs.estimate, column.name) for one in (ours, meant))
        assert (mine is None) == (theirs is None), column.name
        assert mine is None or np.array_equal(mine, theirs, equal_nan=True), column.name
    for name, mine, theirs in zip(meant.costs.sides._fields, ours.costs.sides, meant.costs.sides, strict=True):
        same = (
            mine == theirs if name == "late" else np.array_equal(np.asarray(mine), np.asarray(theirs), equal_nan=True)
        )
        assert same, name


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 1 << 32), workers=st.integers(0, 70), tied=st.booleans(), odd=st.booleans())
def test_both_choose_the_same_way_for_the_same_costs(
    native: Pricing, seed: int, workers: int, tied: bool, odd: bool
) -> None:
    drawn = random.Random(seed)
    fleet = some_fleet(drawn, workers, tied=tied, odd=odd)
    with np.errstate(all="ignore"):
        for _ in range(4):
            asked = some_request(drawn, fleet, drawn.choice((0.0, 2.0)))
            assert_same(native(fleet, asked), price_by_numpy(fleet, asked))


@pytest.mark.parametrize("workers", [1, 63, 64, 65, 500, 1000])
def test_both_agree_in_clusters_of_all_sizes(native: Pricing, workers: int) -> None:
    drawn = random.Random(workers)
    ways = Counter[str]()
    for tied, odd in itertools.product((False, True), repeat=2):
        fleet = some_fleet(drawn, workers, tied=tied, odd=odd)
        with np.errstate(all="ignore"):
            for _ in range(20):
                asked = some_request(drawn, fleet, 2.0)
                meant = price_by_numpy(fleet, asked)
                assert_same(native(fleet, asked), meant)
                ways[meant.way.how if meant else "none"] += 1
    assert len(ways) > 1, "one way alone was taken"


def test_what_changes_between_two_requests_is_seen(native: Pricing) -> None:
    """C++ is told once where columns lie; they move when the cluster grows."""
    drawn = random.Random(0)
    fleet = some_fleet(drawn, 8, tied=False, odd=False)
    for slot in range(8, 40):
        fleet.vacate(slot)
        fleet.settle(slot, float(slot % 3))
        fleet.open(slot, drawn.choice(ROLES), placeable=True, alive=True)
        fleet.rows[slot] = slot
        asked = some_request(drawn, fleet, 2.0)
        assert_same(native(fleet, asked), price_by_numpy(fleet, asked))


def test_without_a_compiler_numpy_prices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path))
    fastest_pricing.cache_clear()
    try:
        assert fastest_pricing() is price_by_numpy
    finally:
        fastest_pricing.cache_clear()
