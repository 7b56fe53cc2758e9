"""The scheduler as its callers see it: who may join, what it asks of workers, what it tells."""

from __future__ import annotations

import asyncio
import pickle
from typing import TYPE_CHECKING

import pytest

from cluster.scheduler.actor import SchedulerActor
from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from diptych.errors import LayoutMismatch, NoWorker
from diptych.types import BlockHash, Counters, Load, ModelSource, Report, RequestId, Stored, WorkerId

if TYPE_CHECKING:
    from collections.abc import Callable

    from diptych.types import WorkerInfo

SPEC = SchedulerSpec(
    model=ModelSource(name="tiny", path="tiny.gguf", digest="d1"), build="b1", policy=Policy(), stale_seconds=5
)
SHAPE = RequestShape(request=RequestId("r"), granules=(), prompt_tokens=10, max_tokens=10)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(SPEC)


def report(
    worker: str, number: int, *, epoch: int = 1, stored: str = "", full: bool = False, running: int = 0
) -> Report:
    return Report(
        worker=WorkerId(worker),
        epoch=epoch,
        number=number,
        load=Load(running_requests=running, blocks_free=100),
        counters=Counters(steps=number),
        events=(Stored(tuple(BlockHash(letter.encode()) for letter in stored)),),
        full=full,
    )


@pytest.mark.parametrize(
    ("different", "sides"),
    [
        ({"build": "b2"}, ("build b2", "build b1")),
        ({"digest": "d2"}, ("digest d2", "digest d1")),
        ({"layers": 3}, ("layers=3", "layers=2")),
        ({"dtype": "fp8"}, ("dtype='fp8'", "dtype='fp32'")),
    ],
)
def test_a_worker_that_cannot_exchange_kv_is_refused_naming_both_sides(
    scheduler: Scheduler, info: Callable[..., WorkerInfo], different: dict[str, str], sides: tuple[str, str]
) -> None:
    scheduler.join(info("d0"), 0.0)
    with pytest.raises(LayoutMismatch) as refused:
        scheduler.join(info("d1", **different), 0.0)
    assert all(side in str(refused.value) for side in ("d1", *sides))
    assert [worker.info.id for worker in scheduler.status(0.0).workers] == ["d0"]


def test_workers_whose_blocks_differ_in_size_can_exchange_kv(
    scheduler: Scheduler, info: Callable[..., WorkerInfo]
) -> None:
    scheduler.join(info("d0"), 0.0)
    scheduler.join(info("d1", block_size=32), 0.0)
    assert [worker.info.id for worker in scheduler.status(0.0).workers] == ["d0", "d1"]


def test_a_worker_may_come_back_with_another_layout_when_it_is_alone(
    scheduler: Scheduler, info: Callable[..., WorkerInfo]
) -> None:
    scheduler.join(info("d0"), 0.0)
    scheduler.join(info("d0", epoch=2, block_size=32), 0.0)
    scheduler.check()
    assert scheduler.status(0.0).workers[0].info.layout.block_size == 32


def test_a_gap_is_answered_with_a_wish_for_a_full_report(scheduler: Scheduler, info: Callable[..., WorkerInfo]) -> None:
    scheduler.join(info("d0"), 0.0)
    assert not scheduler.report(report("d0", 0), 0.0)
    assert scheduler.report(report("d0", 2), 0.0)
    assert not scheduler.report(report("d0", 3, full=True), 0.0)


def test_nothing_is_asked_of_a_worker_whose_epoch_is_over(
    scheduler: Scheduler, info: Callable[..., WorkerInfo]
) -> None:
    scheduler.join(info("d0", epoch=2), 0.0)
    assert scheduler.report(report("d0", 5, epoch=2), 0.0)
    assert not scheduler.report(report("d0", 9), 0.0)
    assert not scheduler.report(report("stranger", 9), 0.0)


def test_a_restarted_scheduler_knows_all_after_one_full_report_each(
    scheduler: Scheduler, info: Callable[..., WorkerInfo]
) -> None:
    for worker, stored in (("d0", "abc"), ("d1", "ab")):
        scheduler.join(info(worker), 0.0)
        scheduler.report(report(worker, 0, stored=stored), 0.0)
    again = Scheduler(SPEC)
    for worker, stored in (("d0", "abc"), ("d1", "ab")):
        again.join(info(worker), 9.0)
        assert again.report(report(worker, 1), 9.0)
        assert not again.report(report(worker, 2, stored=stored, full=True), 9.0)
    again.check()
    assert again.status(9.0).index_blocks == scheduler.status(0.0).index_blocks == 3


def test_a_placement_is_counted_and_a_refused_one_is_not(scheduler: Scheduler, info: Callable[..., WorkerInfo]) -> None:
    with pytest.raises(NoWorker):
        scheduler.place(SHAPE, 0.0)
    scheduler.join(info("d0"), 0.0)
    assert scheduler.place(SHAPE, 0.0).decode == "d0"
    assert scheduler.status(0.0).requests_placed == 1


def test_a_departed_worker_gets_no_request(scheduler: Scheduler, info: Callable[..., WorkerInfo]) -> None:
    scheduler.join(info("d0"), 0.0)
    scheduler.leave(WorkerId("d0"), 1)
    with pytest.raises(NoWorker):
        scheduler.place(SHAPE, 0.0)


def test_status_says_who_is_silent_and_for_how_long(scheduler: Scheduler, info: Callable[..., WorkerInfo]) -> None:
    scheduler.join(info("d0"), 0.0)
    scheduler.join(info("d1"), 0.0)
    scheduler.report(report("d1", 0, running=4), 7.0)
    status = scheduler.status(8.0)
    assert (status.model, status.build) == ("tiny", "b1")
    assert [(worker.info.id, worker.alive, worker.report_age_seconds) for worker in status.workers] == [
        ("d0", False, 8.0),
        ("d1", True, 1.0),
    ]
    assert status.workers[1].load.running_requests == 4


def test_the_actor_answers_as_the_scheduler_does_across_a_pickle(info: Callable[..., WorkerInfo]) -> None:
    async def life() -> None:
        actor = SchedulerActor(pickle.loads(pickle.dumps(SPEC)))
        await actor.join(info("d0"))
        assert await actor.report(report("d0", 1))
        assert not await actor.report(report("d0", 2, full=True))
        placement = await actor.place(pickle.loads(pickle.dumps(SHAPE)))
        assert pickle.loads(pickle.dumps(placement)) == placement
        assert (await actor.status()).workers[0].alive
        await actor.leave(WorkerId("d0"), 1)
        with pytest.raises(NoWorker):
            await actor.place(SHAPE)

    asyncio.run(life())
