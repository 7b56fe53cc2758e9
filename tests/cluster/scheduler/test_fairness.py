"""Shares of work: by weight between tenants, a least one for who comes last, nothing saved up in idleness."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.scheduler.fairness import LeastShare, TenantCounters
from cluster.scheduler.ranked import Ranked


def serve(counters: TenantCounters, rounds: int, work: float = 1.0) -> Counter[str]:
    """Everyone who waits always has more."""
    served: Counter[str] = Counter()
    for _ in range(rounds):
        tenant = counters.next()
        assert tenant is not None
        counters.charge(tenant, work)
        served[tenant] += 1
    return served


def test_tenants_who_always_have_work_get_shares_by_weight() -> None:
    counters = TenantCounters({"gold": 3.0})
    for tenant in ("gold", "a", "b"):
        counters.wake(tenant)
    assert serve(counters, 500) == {"gold": 300, "a": 100, "b": 100}


def test_shares_are_of_work_and_not_of_requests() -> None:
    counters = TenantCounters({})
    counters.wake("large")
    counters.wake("small")
    work = Counter[str]()
    for _ in range(1000):
        tenant = counters.next()
        assert tenant is not None
        seconds = 5.0 if tenant == "large" else 0.5
        counters.charge(tenant, seconds)
        work[tenant] += int(seconds * 10)
    assert abs(work["large"] - work["small"]) <= 100, "apart by two requests at most"


def test_who_was_idle_does_not_catch_up_on_what_it_did_not_ask_for() -> None:
    counters = TenantCounters({})
    counters.wake("busy")
    serve(counters, 100)
    counters.wake("idle until now")
    assert serve(counters, 100)["idle until now"] <= 51


def test_a_tenant_cannot_wipe_out_what_it_had_by_leaving_for_a_moment() -> None:
    counters = TenantCounters({})
    counters.wake("patient")
    counters.wake("sly")
    counters.charge("sly", 10.0)
    counters.rest("sly")
    counters.wake("sly")
    assert serve(counters, 10) == {"patient": 10}


def test_what_was_charged_too_much_is_given_back() -> None:
    counters = TenantCounters({})
    for tenant in ("a", "b"):
        counters.wake(tenant)
        counters.charge(tenant, 10.0)
    counters.charge("b", -4.0, chosen=False)
    assert serve(counters, 4) == {"b": 4}


def test_tenants_that_came_once_are_forgotten() -> None:
    counters = TenantCounters({})
    for number in range(10_000):
        counters.wake(f"t{number}")
        counters.charge(f"t{number}", 1.0)
        counters.rest(f"t{number}")
        counters.wake("regular")
        counters.charge("regular", 1.0)
        counters.rest("regular")
    counters.check()
    assert counters.known <= 3


@pytest.mark.parametrize("sizes", [(1.0,), (0.1, 1.0, 7.0)])
def test_the_last_one_gets_its_share_and_no_more_while_others_have_work(sizes: tuple[float, ...]) -> None:
    drawn, share = random.Random(1), LeastShare(0.05)
    served = {"last": 0.0, "others": 0.0}
    for _ in range(5000):
        work = drawn.choice(sizes)
        if share.is_due(work):
            share.was_served(work)
            served["last"] += work
        else:
            share.others_served(work)
            served["others"] += work
    total = sum(served.values())
    assert 0.05 * total - 2 * max(sizes) <= served["last"] <= 0.05 * total + max(sizes)


def test_what_was_left_over_counts_towards_the_share() -> None:
    share = LeastShare(0.5)
    share.others_served(10.0)
    share.was_served(10.0)
    assert not share.is_due(1.0)


class RankedLikeASortedList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ranked: Ranked[int] = Ranked()
        self.model: dict[int, tuple[float, int]] = {}
        self.turn = 0

    @rule(key=st.integers(0, 8), rank=st.integers(0, 3))
    def put(self, key: int, rank: int) -> None:
        self.turn += 1
        self.ranked.put(key, rank)
        self.model[key] = (rank, self.turn)

    @rule(key=st.integers(0, 8))
    def discard(self, key: int) -> None:
        self.ranked.discard(key)
        self.model.pop(key, None)

    @rule()
    def churn(self) -> None:
        for key in range(100, 300):
            self.ranked.put(key, 0)
            self.ranked.discard(key)

    @invariant()
    def same(self) -> None:
        self.ranked.check()
        assert self.ranked.first() == min(self.model, key=self.model.__getitem__, default=None)
        assert set(self.ranked) == set(self.model)


TestRankedLikeASortedList = RankedLikeASortedList.TestCase
