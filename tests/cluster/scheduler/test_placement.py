"""Where a request runs, and why."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from cluster.scheduler.costs import Costs, Policy, RequestShape
from cluster.scheduler.placement import place
from cluster.scheduler.view import ClusterView, Reported, TimePassed, WorkerJoined
from diptych.errors import NoWorker, PromptTooLong
from diptych.types import BlockHash, Counters, Load, Report, RequestId, Stored, WorkerId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.scheduler.costs import Rule
    from diptych.types import Placement, WorkerInfo

ROLES = {"p": "prefill", "d": "decode", "m": "mixed"}
NAMES = tuple(BlockHash(bytes([byte])) for byte in range(64))


class Cluster:
    """Workers named for their role (p0, d0, m0) whose state tests say in words."""

    def __init__(self, info: Callable[..., WorkerInfo], workers: str) -> None:
        self.view = ClusterView(stale_seconds=5)
        self._numbers: Counter[str] = Counter()
        for name in workers.split():
            self.view.apply(WorkerJoined(info=info(name, role=ROLES[name[0]]), at=0.0))

    def report(self, worker: str, *, stored: int = 0, waiting: int = 0, running: int = 0, free: int = 1000) -> None:
        load = Load(waiting_tokens=waiting, running_requests=running, blocks_free=free)
        report = Report(
            worker=WorkerId(worker),
            epoch=1,
            number=self._numbers[worker],
            load=load,
            counters=Counters(),
            events=(Stored(NAMES[:stored]),),
            full=True,
        )
        self._numbers[worker] += 1
        self.view.apply(Reported(report=report, at=0.0))

    def place(self, tokens: int = 1000, *, how: Rule = "auto", counted: bool = False) -> Placement:
        decision = place(self.view, shape(tokens), Policy(how=how))
        if counted:
            self.view.apply(decision.placed)
        return decision.placement


def shape(tokens: int, max_tokens: int = 100) -> RequestShape:
    return RequestShape(
        request=RequestId("r"), granules=NAMES[: tokens // 16], prompt_tokens=tokens, max_tokens=max_tokens
    )


@pytest.fixture
def cluster(info: Callable[..., WorkerInfo]) -> Callable[[str], Cluster]:
    return lambda workers: Cluster(info, workers)


def terms(placement: Placement, place_: int = 0) -> dict[str, float]:
    return {term.name: term.value for term in placement.candidates[place_].terms}


def test_a_warm_prefill_worker_wins_until_its_queue_costs_more_than_fetching_the_hit(
    cluster: Callable[[str], Cluster],
) -> None:
    some = cluster("p0 p1 d0")
    some.report("p0", stored=50)
    some.report("p1", waiting=400)
    assert some.place(how="remote").prefill == "p0"
    # 800 tokens are 50 blocks: fetching them costs as much as computing 66.
    some.report("p0", stored=50, waiting=460)
    assert some.place(how="remote").prefill == "p0"
    some.report("p0", stored=50, waiting=470)
    placement = some.place(how="remote")
    assert (placement.prefill, placement.prefix_from) == ("p1", "p0")
    assert terms(placement)["prefix fetch"] == 66


def test_a_prefix_is_fetched_only_where_that_is_cheaper_than_computing_it(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0")
    some.report("p0", stored=1, waiting=5000)
    assert some.place(how="remote").prefix_from is None, "a hand-off for 16 tokens"
    some.report("d0", stored=40)
    placement = some.place(how="remote")
    assert (placement.prefill, placement.prefix_from) == ("p1", "d0"), "decode has the last turn"
    some.report("p1", stored=62)
    assert some.place(how="remote").prefix_from is None, "it has it all"


def test_nothing_is_fetched_from_a_silent_worker(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0")
    some.report("p0", stored=60)
    some.view.apply(TimePassed(at=100.0))
    for worker in ("p1", "d0"):
        report = Report(worker=WorkerId(worker), epoch=1, number=0, load=Load(), counters=Counters(), full=True)
        some.view.apply(Reported(report=report, at=100.0))
    assert some.place(how="remote").prefix_from is None


def test_a_hot_prefix_does_not_drown_the_worker_that_holds_it(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0")
    some.report("p0", stored=50)
    chosen = [some.place(how="remote", counted=True).prefill for _ in range(40)]
    # The other one fetches the prefix, and computes as much as the one that has it.
    assert sorted(Counter(chosen).values()) == [20, 20]


def test_a_burst_between_two_reports_spreads_evenly(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 p2 d0 d1 d2")
    placements = [some.place(how="remote", counted=True) for _ in range(30)]
    assert set(Counter(placement.prefill for placement in placements).values()) == {10}
    assert set(Counter(placement.decode for placement in placements).values()) == {10}


def test_equal_workers_take_turns_even_when_every_report_says_idle(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 p2 d0")
    chosen: list[WorkerId | None] = []
    for _ in range(6):
        chosen.append(some.place(how="remote", counted=True).prefill)
        for worker in ("p0", "p1", "p2", "d0"):
            some.report(worker)
    assert Counter(chosen) == {"p0": 2, "p1": 2, "p2": 2}


def test_of_equally_cheap_prefill_workers_the_one_with_fewer_requests_is_chosen(
    cluster: Callable[[str], Cluster],
) -> None:
    for busy, expected in (("p0", "p1"), ("p1", "p0")):
        some = cluster("p0 p1 d0")
        some.report(busy, running=1)
        assert some.place(how="remote").prefill == expected


def test_an_idle_decode_worker_computes_the_prompt_itself(cluster: Callable[[str], Cluster]) -> None:
    placement = cluster("p0 d0").place()
    assert (placement.how, placement.prefill, placement.decode) == ("local", None, "d0")


def test_a_decode_worker_with_running_requests_is_spared_the_prompt(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("d0", running=1)
    placement = some.place()
    assert (placement.how, placement.prefill, placement.decode) == ("remote", "p0", "d0")
    assert terms(placement, 1)["harm to running"] == 500


def test_a_prompt_that_decode_knows_almost_whole_stays_there(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("d0", running=2, stored=62)
    placement = some.place(1000)
    assert placement.how == "local"
    assert terms(placement)["uncached tokens"] == 8


def test_the_decode_worker_that_lacks_fewest_blocks_receives_them(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d1", stored=62)
    placement = some.place(1000, how="remote")
    assert placement.decode == "d1"
    assert terms(placement)["transfer"] == Policy().handoff + 1


def test_the_block_of_the_last_token_is_computed_even_when_it_is_cached(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("p0", stored=62)
    some.report("d0", stored=62)
    placement = some.place(62 * 16, how="remote")
    assert terms(placement)["uncached tokens"] == 16
    assert terms(placement)["transfer"] == Policy().handoff + 1


def test_a_full_decode_worker_is_avoided_and_still_better_than_none(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d0", free=10)
    some.report("d1", running=9)
    assert some.place(how="remote").decode == "d1"
    some.report("d1", free=0)
    assert some.place(how="remote").decode == "d0"


def test_the_less_loaded_decode_worker_is_chosen(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d0", running=3)
    some.report("d1", running=2)
    assert some.place(how="remote").decode == "d1"


def test_a_decode_worker_that_computes_a_prompt_is_a_worse_receiver(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d0", waiting=2000)
    assert some.place(how="remote").decode == "d1"


@pytest.mark.parametrize(("how", "expected"), [("remote", "remote"), ("local", "local")])
def test_the_policy_forces_where_the_prompt_is_computed(
    cluster: Callable[[str], Cluster], how: Rule, expected: str
) -> None:
    some = cluster("p0 d0")
    some.report("d0", running=20 if how == "local" else 0)
    placement = some.place(how=how)
    assert placement.how == expected
    assert {candidate.how for candidate in placement.candidates} == {expected}
    assert f"placement.how = {how}" in placement.reason


def test_a_mixed_worker_does_both(cluster: Callable[[str], Cluster]) -> None:
    placement = cluster("m0").place()
    assert (placement.how, placement.prefill, placement.decode) == ("mixed", None, "m0")


@pytest.mark.parametrize(("workers", "pair"), [("m0 d0", ("m0", "d0")), ("p0 m0", ("p0", "m0"))])
def test_a_mixed_worker_stands_in_for_an_empty_pool(
    cluster: Callable[[str], Cluster], workers: str, pair: tuple[str, str]
) -> None:
    placement = cluster(workers).place(how="remote")
    assert (placement.prefill, placement.decode) == pair


@pytest.mark.parametrize("workers", ["", "p0"])
@pytest.mark.parametrize("how", ["auto", "local"])
def test_without_a_worker_that_decodes_the_refusal_counts_who_lives(
    cluster: Callable[[str], Cluster], workers: str, how: Rule
) -> None:
    count = len(workers.split())
    with pytest.raises(NoWorker, match=f"{count} of {count} prefill, 0 of 0 decode, 0 of 0 mixed"):
        cluster(workers).place(how=how)


@pytest.mark.parametrize("workers", ["p0", "d0", "m0 m1"])
def test_a_forced_hand_off_without_both_pools_says_what_to_do(cluster: Callable[[str], Cluster], workers: str) -> None:
    with pytest.raises(NoWorker, match=r"set placement\.how = auto"):
        cluster(workers).place(how="remote")


def test_a_silent_worker_is_not_placed_on(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.view.apply(TimePassed(at=6.0))
    with pytest.raises(NoWorker, match="0 of 1 prefill, 0 of 1 decode"):
        some.place()


def test_a_request_that_fits_nowhere_is_refused_with_the_limit(info: Callable[..., WorkerInfo]) -> None:
    view = ClusterView(stale_seconds=5)
    view.apply(WorkerJoined(info=info("d0", max_context=1024), at=0.0))
    with pytest.raises(PromptTooLong, match=r"1,000 prompt tokens.*100 are 1,100 tokens.*holds 1,024"):
        place(view, shape(1000, 100), Policy())


def test_a_request_goes_to_the_one_worker_that_can_hold_it(info: Callable[..., WorkerInfo]) -> None:
    view = ClusterView(stale_seconds=5)
    for name, context in (("d0", 1024), ("d1", 2048)):
        view.apply(WorkerJoined(info=info(name, max_context=context), at=0.0))
    placement = place(view, shape(1000, 100), Policy()).placement
    assert placement.decode == "d1"
    assert placement.reason.endswith("there was no other way")


def test_the_decision_explains_itself(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("p0", stored=62, waiting=40)
    some.report("d0", running=3)
    placement = some.place(1000)
    assert placement.reason == (
        "d0 computes 8 of 1,000 prompt tokens behind 0 queued, after fetching 992 from p0's cache, and decodes beside "
        "3 running requests: this costs about as much as computing 122 tokens; the next best (remote, p0 with d0) 151"
    )
    assert placement.candidates[0].cost == 122


def test_a_large_cluster_records_eight_candidates_cheapest_first(cluster: Callable[[str], Cluster]) -> None:
    some = cluster(" ".join(f"p{i} d{i} m{i}" for i in range(20)))
    costs = [candidate.cost for candidate in some.place().candidates]
    assert len(costs) == 8
    assert costs == sorted(costs)


loads = st.tuples(st.integers(0, 62), st.integers(0, 2000), st.integers(0, 9), st.integers(0, 80))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefill=st.lists(loads, max_size=4), decode=st.lists(loads, min_size=1, max_size=4))
def test_no_pair_and_no_single_worker_is_cheaper_than_the_chosen_one(
    info: Callable[..., WorkerInfo],
    prefill: Sequence[tuple[int, int, int, int]],
    decode: Sequence[tuple[int, int, int, int]],
) -> None:
    names = [f"p{i}" for i in range(len(prefill))], [f"d{i}" for i in range(len(decode))]
    some = Cluster(info, " ".join((*names[0], *names[1])))
    for name, (stored, waiting, running, free) in zip((*names[0], *names[1]), (*prefill, *decode), strict=True):
        some.report(name, stored=stored, waiting=waiting, running=running, free=free)
    costs = Costs(shape(1000), Policy(), some.view.longest_prefix(NAMES), lambda _: True)
    pairs = [
        sum(costs.prefill(p)) + sum(costs.decode(d))
        for p in some.view.pool("prefill")
        for d in some.view.pool("decode")
    ]
    alone = [sum(costs.alone(d)) for d in some.view.pool("decode")]
    assert some.place(1000).candidates[0].cost == min(pairs + alone)
