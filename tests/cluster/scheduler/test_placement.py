"""Where a request runs, and why."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.events import Reported, RequestFinished, TimePassed, WorkerJoined
from cluster.scheduler.explain import brief, candidates, reason
from cluster.scheduler.placement import place
from cluster.scheduler.rates import STEP_PRIOR, TRANSFER_PRIOR
from cluster.scheduler.view import ClusterView
from cluster.scheduler.ways import alone, pair
from diptych.errors import NoWorker, PromptTooLong
from diptych.types import (
    BlockHash,
    Counters,
    Load,
    Outcome,
    Report,
    RequestId,
    StepSample,
    Stored,
    TransferSample,
    WorkerId,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.scheduler.costs import Rule
    from cluster.scheduler.placement import Decision
    from diptych.types import WorkerInfo

ROLES = {"p": "prefill", "d": "decode", "m": "mixed"}
NAMES = tuple(BlockHash(bytes([byte])) for byte in range(64))
TOKEN_SECONDS = STEP_PRIOR[1]
FETCH_SECONDS = TRANSFER_PRIOR[0]


class Cluster:
    """Workers named for their role (p0, d0, m0) whose state tests say in words."""

    def __init__(self, info: Callable[..., WorkerInfo], workers: str) -> None:
        self.view = ClusterView(stale_seconds=5)
        self._numbers: Counter[str] = Counter()
        for name in workers.split():
            id_, _, host = name.partition("@")
            self.view.apply(WorkerJoined(info=info(id_, role=ROLES[name[0]], host=host or "here"), at=0.0))

    def report(
        self,
        worker: str,
        *,
        stored: int = 0,
        waiting: int = 0,
        running: int = 0,
        free: int = 1000,
        transfers: tuple[TransferSample, ...] = (),
        steps: tuple[StepSample, ...] = (),
        at: float = 0.0,
    ) -> None:
        load = Load(waiting_tokens=waiting, running_requests=running, blocks_free=free)
        report = Report(
            worker=WorkerId(worker),
            epoch=1,
            number=self._numbers[worker],
            load=load,
            counters=Counters(),
            events=(Stored(NAMES[:stored]),),
            full=True,
            transfers=transfers,
            steps=steps,
        )
        self._numbers[worker] += 1
        self.view.apply(Reported(report=report, at=at))

    def slow_link(self, worker: str, sender: str, seconds: float) -> None:
        """Each transfer to the worker takes so long, whatever its size."""
        told = TransferSample(
            sender=WorkerId(sender), link="mapped", nbytes=1, seconds=seconds, exposed_seconds=seconds
        )
        for _ in range(20):
            self.report(worker, transfers=(told,))

    def slow_steps(self, worker: str, token_seconds: float) -> None:
        """Each prompt token takes it so long."""
        for tokens in range(100, 900, 40):
            told = StepSample(1, tokens, tokens * tokens / 2, 0.0, 0.0, token_seconds * tokens)
            self.report(worker, steps=(told,))

    def place(
        self,
        tokens: int = 1000,
        *,
        how: Rule = "auto",
        counted: bool = False,
        at: float = 0.0,
        ttft_seconds: float | None = None,
        new: bytes = b"",
    ) -> Decision:
        decision = place(self.view, shape(tokens, ttft_seconds=ttft_seconds, new=new), Policy(how=how), at)
        if counted:
            self.view.apply(decision.placed)
        return decision


def shape(tokens: int, max_tokens: int = 100, ttft_seconds: float | None = None, new: bytes = b"") -> RequestShape:
    """`new`: what sets its names apart from those of all others."""
    return RequestShape(
        request=RequestId("r"),
        granules=tuple(BlockHash(new + name) for name in NAMES[: tokens // 16]),
        prompt_tokens=tokens,
        max_tokens=max_tokens,
        ttft_seconds=ttft_seconds,
    )


@pytest.fixture
def cluster(info: Callable[..., WorkerInfo]) -> Callable[[str], Cluster]:
    return lambda workers: Cluster(info, workers)


def terms(decision: Decision, place_: int = 0) -> dict[str, float]:
    return {term.name: term.value for term in candidates(decision.considered)[place_].terms}


def test_a_warm_prefill_worker_wins_until_its_queue_costs_more_than_fetching_the_hit(
    cluster: Callable[[str], Cluster],
) -> None:
    some = cluster("p0 p1 d0")
    some.report("p1", waiting=400)
    # Waiting as long as fetching takes: a millisecond, and 800 tokens of 256 bytes.
    even = int((FETCH_SECONDS + 800 * 256 * TRANSFER_PRIOR[1]) / TOKEN_SECONDS)
    some.report("p0", stored=50, waiting=400 + even - 1)
    assert some.place(how="remote").placement.prefill == "p0"
    some.report("p0", stored=50, waiting=400 + even + 1)
    decision = some.place(how="remote")
    assert (decision.placement.prefill, decision.placement.prefix_from) == ("p1", "p0")
    assert terms(decision)["prefix fetch"] == pytest.approx(FETCH_SECONDS, rel=0.3)


def test_a_prefix_is_fetched_only_where_that_is_faster_than_computing_it(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0")
    some.report("p0", stored=1, waiting=5000)
    assert some.place(how="remote").placement.prefix_from == "p0", "as fast as the prior thinks links are"
    some.slow_link("p1", "p0", 0.01)
    assert some.place(how="remote").placement.prefix_from is None, "ten milliseconds for 16 tokens"
    some.report("d0", stored=40)
    placement = some.place(how="remote").placement
    assert (placement.prefill, placement.prefix_from) == ("p1", "d0"), "decode has the last turn"
    some.report("p1", stored=62)
    assert some.place(how="remote").placement.prefix_from is None, "it has it all"


def test_nothing_is_fetched_from_a_silent_worker(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0")
    some.report("p0", stored=60)
    some.view.apply(TimePassed(at=100.0))
    for worker in ("p1", "d0"):
        some.report(worker, at=100.0)
    assert some.place(how="remote", at=100.0).placement.prefix_from is None


def test_a_hot_prefix_does_not_drown_the_worker_that_holds_it(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0")
    some.report("p0", stored=50)
    chosen = Counter(some.place(how="remote", counted=True).placement.prefill for _ in range(40))
    # Once the wait is longer than is usual the other one fetches the prefix, and from then on they take turns.
    assert max(chosen.values()) <= 28


def test_a_burst_with_one_prefix_goes_where_the_first_of_it_went(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0 d1")
    first = some.place(how="remote", counted=True).placement
    second = some.place(how="remote", counted=True, at=0.2)
    assert second.placement.prefill == first.prefill
    assert second.placement.predicted is not None
    assert second.placement.predicted.cached_tokens == 992, "promised, though no report told of it"
    some.report(str(first.prefill), at=9.0)
    assert some.place(how="remote", at=9.0).placement.predicted.cached_tokens == 0, "a promise nobody kept fades"  # pyright: ignore[reportOptionalMemberAccess]


def test_a_queue_drains_between_reports(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("p0", waiting=1000)
    waits = [some.place(how="remote", at=at).placement.predicted for at in (0.0, 0.06, 5.0)]
    assert [one.wait_seconds for one in waits if one] == pytest.approx([0.1, 0.04, 0.0])


def test_within_a_promise_the_hit_wins_and_beyond_it_the_earliest(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 d0")
    for worker in ("p0", "p1"):
        some.slow_link(worker, "d0", 10.0)
    some.report("p0", stored=50, waiting=3000)
    assert some.place(how="remote").placement.prefill == "p1"
    assert some.place(how="remote", ttft_seconds=2.0).placement.prefill == "p0", "in time, for a fifth of the work"
    assert some.place(how="remote", ttft_seconds=0.2).placement.prefill == "p1"


def test_first_tokens_that_come_late_make_the_next_prediction_later(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    for _ in range(40):
        placed = some.place(how="remote", counted=True, at=0.0).placement.predicted
        some.report("p0")
        some.report("d0")
        assert placed is not None
        outcome = Outcome(RequestId("r"), 0.0, placed.wait_seconds + 0.5, 0.01, 50, None)
        some.view.apply(RequestFinished(outcome=outcome))
    last = some.place(how="remote", at=0.0).placement.predicted
    assert last is not None
    assert last.ttft_seconds - last.wait_seconds == pytest.approx(0.5, abs=0.05)


def test_the_chosen_pair_shares_a_host_when_links_between_hosts_are_slow(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0@a p1@b d0@b d1@b p2@c")
    for receiver in ("d0", "d1"):
        some.slow_link(receiver, "p0", 2.0)
    some.report("p1", waiting=1000)
    assert some.place(how="remote").placement.prefill == "p1"
    some.report("p1", waiting=50000)
    assert some.place(how="remote").placement.prefill in {"p0", "p2"}


def test_a_burst_between_two_reports_spreads_evenly(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 p2 d0 d1 d2")
    placements = [some.place(how="remote", counted=True, new=bytes([one])).placement for one in range(30)]
    assert set(Counter(placement.prefill for placement in placements).values()) == {10}
    assert set(Counter(placement.decode for placement in placements).values()) == {10}


def test_nobody_queues_at_the_worker_that_measured_faster_steps_while_its_equal_idles(
    cluster: Callable[[str], Cluster],
) -> None:
    some = cluster("p0 p1 d0")
    some.slow_steps("p0", 1e-4)
    some.slow_steps("p1", 1.5e-4)
    for one in range(60):
        some.place(how="remote", counted=True, new=bytes([one]))
    some.report("p0", waiting=1500, at=9.0)
    some.report("p1", at=9.0)
    usual = some.view.usual.seconds
    assert usual is not None
    assert usual > 1.0, "what waits at p0 is well within it"
    assert some.place(how="remote", at=9.0, new=b"new").placement.prefill == "p1"


def test_equal_workers_take_turns_even_when_every_report_says_idle(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 p1 p2 d0")
    chosen: list[WorkerId | None] = []
    for one in range(6):
        chosen.append(some.place(how="remote", counted=True, at=float(one), new=bytes([one])).placement.prefill)
        for worker in ("p0", "p1", "p2", "d0"):
            some.report(worker, at=one + 0.5)
    assert Counter(chosen) == {"p0": 2, "p1": 2, "p2": 2}


def test_of_equally_cheap_prefill_workers_the_one_with_fewer_requests_is_chosen(
    cluster: Callable[[str], Cluster],
) -> None:
    for busy, expected in (("p0", "p1"), ("p1", "p0")):
        some = cluster("p0 p1 d0")
        some.report(busy, running=1)
        assert some.place(how="remote").placement.prefill == expected


def test_an_idle_decode_worker_computes_the_prompt_itself(cluster: Callable[[str], Cluster]) -> None:
    placement = cluster("p0 d0").place().placement
    assert (placement.how, placement.prefill, placement.decode) == ("local", None, "d0")


def test_a_decode_worker_with_running_requests_is_spared_the_prompt(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("d0", running=2)
    decision = some.place()
    placement = decision.placement
    assert (placement.how, placement.prefill, placement.decode) == ("remote", "p0", "d0")
    # Each of them would wait until a thousand tokens are computed.
    assert terms(decision, 1)["others wait for the prompt"] == pytest.approx(2 * 1000 * TOKEN_SECONDS, rel=0.1)


def test_a_prompt_that_decode_knows_almost_whole_stays_there(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("d0", running=2, stored=62)
    decision = some.place(1000)
    assert decision.placement.how == "local"
    assert decision.placed.tokens == 8


def test_the_decode_worker_that_lacks_fewest_blocks_receives_them(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d1", stored=62)
    decision = some.place(1000, how="remote")
    assert decision.placement.decode == "d1"
    assert decision.placed.blocks == 1


def test_the_block_of_the_last_token_is_computed_even_when_it_is_cached(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("p0", stored=62)
    some.report("d0", stored=62)
    decision = some.place(62 * 16, how="remote")
    assert decision.placed.tokens == 16
    assert decision.placement.predicted is not None
    assert decision.placement.predicted.cached_tokens == 61 * 16
    assert decision.placement.predicted.transfer_bytes == 16 * 256


def test_a_full_decode_worker_is_avoided_and_still_better_than_none(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d0", free=10)
    some.report("d1", running=9)
    assert some.place(how="remote").placement.decode == "d1"
    some.report("d1", free=0)
    assert some.place(how="remote").placement.decode == "d0"


def test_the_less_loaded_decode_worker_is_chosen(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d0", running=3)
    some.report("d1", running=2)
    assert some.place(how="remote").placement.decode == "d1"


def test_a_decode_worker_that_computes_a_prompt_is_a_worse_receiver(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0 d1")
    some.report("d0", waiting=2000)
    assert some.place(how="remote").placement.decode == "d1"


@pytest.mark.parametrize(("how", "expected"), [("remote", "remote"), ("local", "local")])
def test_the_policy_forces_where_the_prompt_is_computed(
    cluster: Callable[[str], Cluster], how: Rule, expected: str
) -> None:
    some = cluster("p0 d0")
    some.report("d0", running=20 if how == "local" else 0)
    decision = some.place(how=how)
    assert decision.placement.how == expected
    assert {candidate.how for candidate in candidates(decision.considered)} == {expected}
    assert f"placement.how = {how}" in reason(decision.considered)


def test_a_mixed_worker_does_both(cluster: Callable[[str], Cluster]) -> None:
    placement = cluster("m0").place().placement
    assert (placement.how, placement.prefill, placement.decode) == ("mixed", None, "m0")


@pytest.mark.parametrize(("workers", "pair"), [("m0 d0", ("m0", "d0")), ("p0 m0", ("p0", "m0"))])
def test_a_mixed_worker_stands_in_for_an_empty_pool(
    cluster: Callable[[str], Cluster], workers: str, pair: tuple[str, str]
) -> None:
    placement = cluster(workers).place(how="remote").placement
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
        place(view, shape(1000, 100), Policy(), 0.0)


def test_a_request_goes_to_the_one_worker_that_can_hold_it(info: Callable[..., WorkerInfo]) -> None:
    view = ClusterView(stale_seconds=5)
    for name, context in (("d0", 1024), ("d1", 2048)):
        view.apply(WorkerJoined(info=info(name, max_context=context), at=0.0))
    decision = place(view, shape(1000, 100), Policy(), 0.0)
    assert decision.placement.decode == "d1"
    assert reason(decision.considered).endswith("there was no other way")


def test_the_decision_explains_itself(cluster: Callable[[str], Cluster]) -> None:
    some = cluster("p0 d0")
    some.report("p0", stored=62, waiting=400)
    some.report("d0", running=3)
    decision = some.place(1000)
    assert reason(decision.considered) == (
        "d0 computes 8 of 1,000 prompt tokens behind 0.0 ms of queue, after fetching 992 from p0's cache, and decodes "
        "beside 3 other requests: first token after 7.4 ms, 5.4 ms between tokens, cost 590.1 ms; the next best "
        "(remote, p0 with d0) 626.8 ms"
    )
    assert candidates(decision.considered)[0].cost == pytest.approx(decision.considered.way.cost)


def test_of_a_thousand_workers_the_few_that_matter_are_kept(cluster: Callable[[str], Cluster]) -> None:
    some = cluster(" ".join(f"p{i} d{i} m{i}" for i in range(20)))
    for busy in range(19):
        some.report(f"d{busy}", running=1 + busy)
    decision = some.place()
    costs = [candidate.cost for candidate in candidates(decision.considered)]
    assert len(costs) == 8
    assert costs == sorted(costs)
    short = brief(decision.considered)
    assert len(short.ids) <= 17
    assert (reason(short), candidates(short)[0]) == (reason(decision.considered), candidates(decision.considered)[0])


loads = st.tuples(
    st.integers(0, 62), st.integers(0, 2000), st.integers(0, 9), st.integers(0, 80), st.sampled_from("abc")
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    prefill=st.lists(loads, min_size=1, max_size=5),
    decode=st.lists(loads, min_size=1, max_size=5),
    link_seconds=st.sampled_from([0.0001, 0.01, 1.0]),
)
def test_no_pair_and_no_single_worker_is_cheaper_than_the_chosen_way(
    info: Callable[..., WorkerInfo],
    prefill: Sequence[tuple[int, int, int, int, str]],
    decode: Sequence[tuple[int, int, int, int, str]],
    link_seconds: float,
) -> None:
    named = [(f"p{i}", load) for i, load in enumerate(prefill)] + [(f"d{i}", load) for i, load in enumerate(decode)]
    some = Cluster(info, " ".join(f"{name}@{load[4]}" for name, load in named))
    some.slow_link("d0", "p0", link_seconds)
    for name, (stored, waiting, running, free, _) in named:
        some.report(name, stored=stored, waiting=waiting, running=running, free=free)
    decision = some.place(1000)
    sides, workers = decision.considered.sides, some.view.workers
    slots = [[workers[WorkerId(name)].slot for name, _ in named if name[0] == role] for role in "pd"]
    pairs = [pair(sides, decision.considered.hosts, *both).cost for both in product(*slots)]
    single = [alone(sides, "local", slot).cost for slot in slots[1]]
    assert decision.considered.way.cost == min(pairs + single)
