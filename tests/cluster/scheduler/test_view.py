"""The view as a fold: what a report changes, and which reports change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from cluster.scheduler.events import (
    Reported,
    RequestPlaced,
    TimePassed,
    WorkerJoined,
    WorkerLeft,
)
from cluster.scheduler.rates import STEP_PRIOR
from cluster.scheduler.view import ClusterView
from diptych.types import (
    BlockHash,
    Counters,
    Evicted,
    KvEvent,
    Load,
    Placement,
    Prediction,
    Report,
    RequestId,
    Stored,
    WorkerId,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from diptych.types import WorkerInfo

W = WorkerId("w")


def names(text: str) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(letter.encode()) for letter in text)


def report(
    number: int, *events: KvEvent, full: bool = False, epoch: int = 1, load: Load | None = None, at: float = 0.0
) -> Reported:
    told = Report(
        worker=W, epoch=epoch, number=number, load=load or Load(), counters=Counters(), events=events, full=full
    )
    return Reported(report=told, at=at)


@pytest.fixture
def view(info: Callable[..., WorkerInfo]) -> ClusterView:
    """One worker that has not reported yet."""
    view = ClusterView(stale_seconds=5)
    view.apply(WorkerJoined(info=info("w"), at=0.0))
    return view


def hit(view: ClusterView, text: str) -> int:
    view.check()
    return view.longest_prefix(names(text)).get(W, 0)


def test_reports_in_order_add_up(view: ClusterView) -> None:
    view.apply(report(0, Stored(names("ab"))))
    view.apply(report(1, Evicted(names("b"))))
    view.apply(report(2, Stored(names("bc")), load=Load(running_requests=3)))
    assert hit(view, "abcd") == 48
    assert view.workers[W].load.running_requests == 3
    assert not view.workers[W].needs_full


def test_a_duplicate_changes_nothing(view: ClusterView) -> None:
    view.apply(report(0, Stored(names("a")), load=Load(running_requests=1)))
    view.apply(report(1, Evicted(names("a")), load=Load(running_requests=2)))
    view.apply(report(0, Stored(names("a")), load=Load(running_requests=1)))
    assert hit(view, "a") == 0
    assert view.workers[W].load.running_requests == 2


def test_after_a_gap_the_load_counts_and_the_cache_waits_for_a_full_report(view: ClusterView) -> None:
    view.apply(report(0, Stored(names("a"))))
    view.apply(report(2, Stored(names("b")), load=Load(running_requests=7)))
    assert view.workers[W].needs_full
    assert view.workers[W].load.running_requests == 7
    view.apply(report(3, Stored(names("b"))))
    assert view.workers[W].needs_full
    assert hit(view, "ab") == 16
    view.apply(report(4, Stored(names("xy")), full=True))
    assert not view.workers[W].needs_full
    assert hit(view, "ab") == 0
    assert hit(view, "xy") == 32


def test_a_full_report_repairs_the_gap_it_comes_with(view: ClusterView) -> None:
    view.apply(report(9, Stored(names("ab")), full=True))
    view.apply(report(10, Stored(names("c"))))
    assert not view.workers[W].needs_full
    assert hit(view, "abc") == 48


def test_a_late_full_report_does_not_undo_newer_ones(view: ClusterView) -> None:
    view.apply(report(5, Stored(names("ab")), full=True))
    view.apply(report(4, Stored(names("xy")), full=True))
    assert hit(view, "ab") == 32


def test_a_first_report_that_is_not_the_first_is_a_gap(view: ClusterView) -> None:
    view.apply(report(3, Stored(names("a"))))
    assert view.workers[W].needs_full


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_report_of_another_epoch_is_dropped(view: ClusterView, epoch: int) -> None:
    view.apply(report(0, Stored(names("a")), epoch=epoch, load=Load(running_requests=1)))
    assert hit(view, "a") == 0
    assert view.workers[W].load.running_requests == 0


def test_a_report_of_a_stranger_joins_nobody() -> None:
    view = ClusterView(stale_seconds=5)
    view.apply(report(0, Stored(names("a"))))
    assert not view.workers
    assert view.index_blocks == 0


def test_a_worker_that_joins_anew_has_nothing_of_its_former_life(
    view: ClusterView, info: Callable[..., WorkerInfo]
) -> None:
    view.apply(report(0, Stored(names("a"))))
    view.apply(WorkerJoined(info=info("w", epoch=2), at=1.0))
    assert hit(view, "a") == 0
    view.apply(report(1, Stored(names("a"))))
    assert hit(view, "a") == 0
    view.apply(report(0, Stored(names("a")), epoch=2))
    assert hit(view, "a") == 16


@pytest.mark.parametrize("epoch", [0, 1])
def test_joining_twice_or_too_late_changes_nothing(
    view: ClusterView, info: Callable[..., WorkerInfo], epoch: int
) -> None:
    view.apply(report(0, Stored(names("a"))))
    view.apply(WorkerJoined(info=info("w", epoch=epoch), at=1.0))
    assert hit(view, "a") == 16


def test_a_departed_worker_leaves_no_block_behind(view: ClusterView) -> None:
    view.apply(report(0, Stored(names("ab"))))
    view.apply(WorkerLeft(worker=W, epoch=1))
    view.check()
    assert not view.workers
    assert view.index_blocks == 0


def test_the_departure_of_a_former_life_does_not_end_this_one(
    view: ClusterView, info: Callable[..., WorkerInfo]
) -> None:
    view.apply(WorkerJoined(info=info("w", epoch=2), at=1.0))
    view.apply(WorkerLeft(worker=W, epoch=1))
    assert W in view.workers


def counted(view: ClusterView) -> tuple[float, float, float]:
    """When it has computed what waits, its requests, and its room in blocks."""
    slot, fleet = view.workers[W].slot, view.fleet
    return float(fleet.idle_at[1, slot]), float(fleet.requests[slot]), float(fleet.room_tokens[slot]) / 16


def test_what_was_placed_counts_until_a_report_can_have_seen_it(view: ClusterView) -> None:
    view.apply(report(0, load=Load(waiting_tokens=100, running_requests=2, blocks_free=50, blocks_cached=10)))
    waiting_seconds = 100 * STEP_PRIOR[1]
    assert counted(view) == (pytest.approx(waiting_seconds), 2, 60)
    placement = Placement(decode=W, prefill=None, how="local", predicted=Prediction(0.0, 0.5, 0.01, 0, 0))
    view.apply(RequestPlaced(0.0, RequestId("r"), placement, 1, (), 40, 0.3, 3, 40.0))
    assert counted(view) == (pytest.approx(waiting_seconds + 0.3), 3, 57)
    before = Load(waiting_tokens=90, running_requests=2, blocks_free=50, blocks_cached=10)
    view.apply(report(1, load=before, at=0.001))
    assert counted(view) == (pytest.approx(0.001 + 0.3 + 90 * STEP_PRIOR[1]), 3, 57), "it had not arrived"
    after = Load(waiting_tokens=40, running_requests=3, blocks_free=47, blocks_cached=10)
    view.apply(report(2, load=after, at=0.1))
    assert counted(view) == (pytest.approx(0.1 + 0.3), 3, 57), "what waits is what was placed last"
    assert view.requests_placed == 1


def test_a_silent_worker_is_out_of_its_pool_until_it_speaks(view: ClusterView) -> None:
    view.apply(TimePassed(at=5.0))
    assert len(view.pool("decode")) == 1
    view.apply(TimePassed(at=5.1))
    assert view.pool("decode") == []
    view.apply(report(0, at=5.2))
    assert len(view.pool("decode")) == 1


def test_a_newcomer_has_all_its_blocks_free_before_it_reports(view: ClusterView) -> None:
    assert counted(view)[2] == 1000


@given(
    steps=st.lists(st.tuples(st.sampled_from(["store", "evict"]), st.sampled_from("abcd")), max_size=12),
    arrives=st.lists(st.booleans(), min_size=12, max_size=12),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_reports_are_lost_one_full_report_makes_it_whole(
    info: Callable[..., WorkerInfo], steps: list[tuple[str, str]], arrives: list[bool]
) -> None:
    view = ClusterView(stale_seconds=5)
    view.apply(WorkerJoined(info=info("w"), at=0.0))
    truth: set[BlockHash] = set()
    for number, (act, letter) in enumerate(steps):
        truth = truth | set(names(letter)) if act == "store" else truth - set(names(letter))
        event = Stored(names(letter)) if act == "store" else Evicted(names(letter))
        if arrives[number]:
            view.apply(report(number, event))
    view.apply(report(len(steps)))
    assert view.workers[W].needs_full == (not all(arrives[: len(steps)]))
    if view.workers[W].needs_full:
        view.apply(report(len(steps) + 1, Stored(tuple(truth)), full=True))
    view.check()
    assert not view.workers[W].needs_full
    assert {name for name in names("abcd") if view.longest_prefix((name,))} == truth
