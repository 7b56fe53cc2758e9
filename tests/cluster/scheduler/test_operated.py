"""Workers that drain or change their role: what they get from now on, and what is still found in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.scheduler.events import (
    Reported,
    RoleChanged,
    TimePassed,
    WorkerDrains,
    WorkerJoined,
)
from cluster.scheduler.view import ClusterView
from diptych.hashing import granule_hashes
from diptych.types import BlockHash, Counters, Load, Report, Stored, WorkerId, WorkerInfo

ROOT = BlockHash(bytes(32))
NAMES = granule_hashes(tuple(range(160)), ROOT)


def view_of(*workers: WorkerInfo) -> ClusterView:
    view = ClusterView(stale_seconds=10.0)
    for worker in workers:
        view.apply(WorkerJoined(info=worker, at=0.0))
    return view


def told(worker: str, number: int, at: float, *events: Stored) -> Reported:
    report = Report(
        worker=WorkerId(worker), epoch=1, number=number, load=Load(blocks_free=900), counters=Counters(), events=events
    )
    return Reported(report=report, at=at)


def test_a_worker_that_drains_gets_nothing_and_is_still_borrowed_from(info: Callable[..., WorkerInfo]) -> None:
    view = view_of(info("d0"), info("d1"))
    view.apply(told("d0", 0, 1.0, Stored(NAMES)))
    view.apply(WorkerDrains(worker=WorkerId("d0"), epoch=1))
    view.check()
    assert [worker.info.id for worker in view.pool("decode")] == ["d1"]
    assert view.longest_prefix(NAMES) == {"d0": 160}
    assert view.fleet.alive[view.workers[WorkerId("d0")].slot] == 1.0


def test_reports_silence_and_speech_do_not_end_a_drain(info: Callable[..., WorkerInfo]) -> None:
    view = view_of(info("d0"), info("d1"))
    view.apply(WorkerDrains(worker=WorkerId("d0"), epoch=1))
    view.apply(told("d0", 0, 1.0))
    view.apply(TimePassed(at=30.0))
    view.apply(told("d0", 1, 31.0))
    view.check()
    assert view.workers[WorkerId("d0")].draining
    assert not view.pool("decode")


def test_the_next_incarnation_does_not_drain(info: Callable[..., WorkerInfo]) -> None:
    view = view_of(info("d0"))
    view.apply(WorkerDrains(worker=WorkerId("d0"), epoch=1))
    view.apply(WorkerJoined(info=info("d0", epoch=2), at=1.0))
    view.apply(WorkerDrains(worker=WorkerId("d0"), epoch=1))
    view.check()
    assert [worker.info.epoch for worker in view.pool("decode")] == [2]


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_role_is_a_state(info: Callable[..., WorkerInfo], role: str) -> None:
    view = view_of(info("d0"), info("d1"))
    view.apply(told("d0", 0, 1.0, Stored(NAMES)))
    view.apply(RoleChanged(worker=WorkerId("d0"), epoch=1, role=role))  # pyright: ignore[reportArgumentType]
    view.check()
    assert [worker.info.id for worker in view.pool(role)] == ["d0"]  # pyright: ignore[reportArgumentType]
    assert [worker.info.id for worker in view.pool("decode")] == ["d1"]
    assert view.longest_prefix(NAMES) == {"d0": 160}
    view.apply(RoleChanged(worker=WorkerId("d0"), epoch=1, role="decode"))
    view.check()
    assert len(view.pool("decode")) == 2


def test_a_change_of_a_buried_worker_changes_nothing(info: Callable[..., WorkerInfo]) -> None:
    view = view_of(info("d0", epoch=3))
    view.apply(RoleChanged(worker=WorkerId("d0"), epoch=2, role="prefill"))
    view.apply(WorkerDrains(worker=WorkerId("gone"), epoch=1))
    view.check()
    assert len(view.pool("decode")) == 1
