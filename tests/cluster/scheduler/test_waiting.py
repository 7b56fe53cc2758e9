"""Requests that wait: whatever happens, each is told once, in a promised order, and can leave at once."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.scheduler.actor import SchedulerActor
from cluster.scheduler.admission import Admission, AdmissionPolicy
from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from diptych.errors import DeadlineExceeded, NoWorker, Overloaded, PromptTooLong
from diptych.types import (
    Counters,
    KvLayout,
    Load,
    ModelSource,
    Outcome,
    Placement,
    Report,
    RequestId,
    WorkerId,
    WorkerInfo,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = ModelSource(name="tiny", path="tiny.gguf", digest="d1")
BUSY = Load(waiting_requests=9, waiting_tokens=100_000, running_requests=9, blocks_free=0)
IDLE = Load(blocks_free=1000)


def spec(**admission: object) -> SchedulerSpec:
    return SchedulerSpec(
        model=MODEL, build="b1", policy=Policy(), stale_seconds=30, admission=AdmissionPolicy(**admission)
    )


def shape(name: str, *, tokens: int = 100, **fields: object) -> RequestShape:
    return RequestShape(request=RequestId(name), granules=(), prompt_tokens=tokens, max_tokens=10, **fields)


def report(number: int, load: Load, *, worker: str = "m0", epoch: int = 1) -> Report:
    return Report(worker=WorkerId(worker), epoch=epoch, number=number, load=load, counters=Counters())


@pytest.fixture
def busy(info: Callable[..., WorkerInfo]) -> Scheduler:
    """One mixed worker, which has more to do than fits."""
    scheduler = Scheduler(spec(queue=(4, 4, 4)))
    scheduler.join(info("m0", role="mixed"), 0.0)
    scheduler.report(report(0, BUSY), 0.0)
    return scheduler


def told(scheduler: Scheduler, now: float) -> list[str]:
    return [request for request, _ in scheduler.advance(now)]


def test_who_waits_is_placed_when_the_worker_is_about_to_run_out_of_work(busy: Scheduler) -> None:
    assert busy.submit(shape("a"), 0.0) is None
    assert busy.advance(1.0) == []
    busy.report(report(1, IDLE), 2.0)
    [(request, placement)] = busy.advance(2.0)
    assert request == "a"
    assert isinstance(placement, Placement)
    assert placement.decode == "m0"
    busy.check()


def test_the_time_at_which_the_backlog_is_short_enough_is_known_without_news(info: Callable[..., WorkerInfo]) -> None:
    scheduler = Scheduler(spec())
    scheduler.join(info("m0", role="mixed"), 0.0)
    for number in range(4):
        scheduler.submit(shape(f"r{number}", tokens=4000), 0.0)
    assert scheduler.status(0.0).queues[1].length == 3, "one at a time: each takes seconds"
    turn = scheduler.next_turn(0.0)
    assert turn is not None
    assert scheduler.advance(turn - 0.01) == []
    assert len(scheduler.advance(turn)) == 1


def test_more_important_ones_go_first_and_equals_in_the_order_of_arrival(busy: Scheduler) -> None:
    for name, priority in (("low", 5), ("first", 0), ("second", 0), ("high", -3)):
        assert busy.submit(shape(name, priority=priority), 0.0) is None
    busy.report(report(1, IDLE), 1.0)
    assert told(busy, 1.0) == ["high", "first", "second", "low"]


def test_of_one_tenant_the_one_that_must_start_soonest_goes_first(busy: Scheduler) -> None:
    for name, seconds in (("later", 9.0), ("soon", 5.0), ("missed", 0.1)):
        assert busy.submit(shape(name, ttft_seconds=seconds), 0.0) is None
    busy.report(report(1, IDLE), 1.0)
    assert told(busy, 1.0) == ["soon", "later", "missed"]


def test_a_deadline_that_passes_ends_the_wait_at_once(busy: Scheduler) -> None:
    busy.report(report(1, BUSY), 0.0)
    assert busy.submit(shape("short", deadline_seconds=3.0), 0.0) is None
    assert busy.submit(shape("long", deadline_seconds=9.0), 0.0) is None
    assert busy.next_turn(0.0) == 3.0
    [(request, error)] = busy.advance(3.0)
    assert request == "short"
    assert isinstance(error, DeadlineExceeded)
    assert busy.next_turn(3.0) == 9.0


def test_who_is_withdrawn_is_never_told_and_gives_its_place_free(busy: Scheduler) -> None:
    for number in range(4):
        busy.submit(shape(f"r{number}"), 0.0)
    with pytest.raises(Overloaded, match="4 requests of normal priority wait, 4 may"):
        busy.submit(shape("one too many"), 0.0)
    busy.withdraw(RequestId("r1"), 0.0)
    busy.withdraw(RequestId("r1"), 0.0)
    assert busy.submit(shape("r4"), 0.0) is None
    busy.report(report(1, IDLE), 1.0)
    assert told(busy, 1.0) == ["r0", "r2", "r3", "r4"]


def test_a_full_class_does_not_close_the_others(busy: Scheduler) -> None:
    for number in range(4):
        busy.submit(shape(f"r{number}", priority=1), 0.0)
    with pytest.raises(Overloaded):
        busy.submit(shape("low", priority=1), 0.0)
    assert busy.submit(shape("high", priority=-1), 0.0) is None
    rejected = [dict(queue.rejected) for queue in busy.status(0.0).queues]
    assert rejected == [{}, {}, {"queue full": 1}]


def test_one_tenant_cannot_fill_a_queue_that_others_want(info: Callable[..., WorkerInfo]) -> None:
    scheduler = Scheduler(spec(queue=(900, 900, 900)))
    scheduler.join(info("m0", role="mixed"), 0.0)
    scheduler.report(report(0, BUSY), 0.0)
    for number in range(800):
        assert scheduler.submit(shape(f"a{number}", tenant="a"), 0.0) is None
    with pytest.raises(Overloaded, match="800 of them are this tenant's, and 100 places are for others"):
        scheduler.submit(shape("a800", tenant="a"), 0.0)
    for number in range(50):
        assert scheduler.submit(shape(f"b{number}", tenant="b"), 0.0) is None


def test_those_who_wait_outlast_a_worker_that_comes_back_and_not_one_that_does_not(
    busy: Scheduler, info: Callable[..., WorkerInfo]
) -> None:
    busy.submit(shape("a"), 0.0)
    busy.leave(WorkerId("m0"), 1)
    assert busy.advance(1.0) == []
    with pytest.raises(NoWorker):
        busy.submit(shape("comes now", priority=-1), 1.0)
    busy.join(info("m0", role="mixed", epoch=2), 20.0)
    assert told(busy, 20.0) == ["a"]

    busy.report(report(0, BUSY, epoch=2), 21.0)
    busy.submit(shape("b"), 21.0)
    busy.leave(WorkerId("m0"), 2)
    assert busy.advance(100.0) == []
    assert busy.next_turn(100.0) == 160.0
    [(request, error)] = busy.advance(160.0)
    assert (request, type(error)) == ("b", NoWorker)


def test_a_prompt_that_fits_nowhere_is_refused_whoever_waits(busy: Scheduler) -> None:
    with pytest.raises(PromptTooLong):
        busy.submit(shape("too long", tokens=10_000), 0.0)
    assert busy.submit(shape("fits"), 0.0) is None


def test_tenants_pay_for_answers_when_they_are_over(info: Callable[..., WorkerInfo]) -> None:
    scheduler = Scheduler(spec())
    scheduler.join(info("m0", role="mixed"), 0.0)
    assert scheduler.submit(shape("talkative", tenant="a"), 0.0) is not None
    scheduler.report(report(0, BUSY), 0.0)
    for name, tenant in (("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b")):
        scheduler.submit(shape(name, tenant=tenant), 0.1)
    done = Outcome(RequestId("talkative"), 0.0, 0.1, 0.1, 500, None)
    scheduler.finished(done, 0.2)
    scheduler.finished(done, 0.2)
    scheduler.report(report(1, IDLE), 1.0)
    assert told(scheduler, 1.0) == ["b1", "b2", "a1", "a2"]


# ---- the actor ----------------------------------------------------------------------------------------------


def test_the_actors_answer_waits_for_the_turn_and_ends_when_it_is_withdrawn(info: Callable[..., WorkerInfo]) -> None:
    async def life() -> None:
        actor = SchedulerActor(spec())
        await actor.join(info("m0", role="mixed"))
        await actor.report(report(0, BUSY))
        first, second = (asyncio.ensure_future(actor.place(shape(name))) for name in ("a", "b"))
        await asyncio.sleep(0)
        assert [await actor.is_waiting(RequestId(name)) for name in "abc"] == [True, True, False]
        await actor.withdraw(RequestId("b"))
        assert await second is None
        assert not first.done()
        await actor.report(report(1, IDLE))
        placement = await asyncio.wait_for(first, 10)
        assert placement is not None
        assert placement.decode == "m0"
        assert not await actor.is_waiting(RequestId("a"))

    asyncio.run(life())


def test_the_actor_wakes_by_itself_for_a_deadline(info: Callable[..., WorkerInfo]) -> None:
    async def life() -> None:
        actor = SchedulerActor(spec())
        await actor.join(info("m0", role="mixed"))
        await actor.report(report(0, BUSY))
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(actor.place(shape("a", tokens=10, deadline_seconds=0.5)), 30)

    asyncio.run(life())


def test_a_call_that_is_cancelled_leaves_the_queue(info: Callable[..., WorkerInfo]) -> None:
    async def life() -> None:
        actor = SchedulerActor(spec())
        await actor.join(info("m0", role="mixed"))
        await actor.report(report(0, BUSY))
        calls = [asyncio.ensure_future(actor.place(shape(name))) for name in "ab"]
        await asyncio.sleep(0)
        calls[0].cancel()
        await asyncio.wait([calls[0]])
        assert (await actor.status()).queues[1].length == 1
        await actor.report(report(1, IDLE))
        assert await calls[1] is not None

    asyncio.run(life())


# ---- whatever happens ---------------------------------------------------------------------------------------

NAMES = ("m0", "m1")


class Life(RuleBasedStateMachine):
    """Two workers that report what they like, requests of all kinds, cancels at any time."""

    @initialize()
    def start(self) -> None:
        self.scheduler = Scheduler(spec(queue=(3, 5, 3)))
        self.now = 0.0
        self.epochs: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        self.waiting: dict[str, float | None] = {}
        """With their deadlines."""
        self.count = 0
        self.free: set[str] = set()
        """Workers that said they have nothing to do and were given nothing since, or shortly before."""
        self.given_at: dict[str, float] = {}

    @rule(worker=st.sampled_from(NAMES))
    def joins(self, worker: str) -> None:
        self.epochs[worker] = epoch = self.epochs.get(worker, 0) + 1
        self.numbers[worker] = 0
        layout = KvLayout(layers=1, kv_heads=1, block_size=16, head_dim=8, dtype="fp32")
        self.scheduler.join(
            WorkerInfo(
                id=WorkerId(worker),
                role="mixed",
                epoch=epoch,
                build="b1",
                model_digest="d1",
                layout=layout,
                blocks=1000,
                max_context=8192,
                device="cpu",
                host="h",
                pid=1,
                threads=1,
            ),
            self.now,
        )
        self.free.add(worker)
        self.advances()

    @rule(worker=st.sampled_from(NAMES))
    def leaves(self, worker: str) -> None:
        self.scheduler.leave(WorkerId(worker), self.epochs.get(worker, 0))
        self.free.discard(worker)
        self.numbers.pop(worker, None)

    @rule(worker=st.sampled_from(NAMES), load=st.sampled_from((BUSY, IDLE)))
    def reports(self, worker: str, load: Load) -> None:
        if worker not in self.numbers:
            return
        self.scheduler.report(report(self.numbers[worker], load, worker=worker, epoch=self.epochs[worker]), self.now)
        self.numbers[worker] += 1
        is_free = load is IDLE and self.now - self.given_at.get(worker, -1.0) > 0.25
        (self.free.add if is_free else self.free.discard)(worker)
        self.advances()

    @rule(
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("ab"),
        ttft=st.sampled_from((None, 0.1, 5.0)),
        deadline=st.sampled_from((None, 0.5, 50.0)),
        tokens=st.sampled_from((10, 3000, 9000)),
    )
    def asks(self, priority: int, tenant: str, ttft: float | None, deadline: float | None, tokens: int) -> None:
        self.count += 1
        name = f"r{self.count}"
        asked = shape(
            name, tokens=tokens, priority=priority, tenant=tenant, ttft_seconds=ttft, deadline_seconds=deadline
        )
        try:
            placement = self.scheduler.submit(asked, self.now)
        except (Overloaded, PromptTooLong):
            return
        if placement is None:
            self.waiting[name] = None if deadline is None else self.now + deadline
        else:
            self.given(placement)

    @rule(seconds=st.sampled_from((0.01, 0.3, 10.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.now - seconds < (turn := self.scheduler.next_turn(self.now - seconds) or self.now) < self.now:
            self.now = turn
        self.advances()

    @rule(place=st.integers(0, 20))
    def cancels(self, place: int) -> None:
        name = f"r{place}"
        self.scheduler.withdraw(RequestId(name), self.now)
        self.waiting.pop(name, None)

    def given(self, placement: Placement) -> None:
        self.free.discard(placement.decode)
        self.given_at[placement.decode] = self.now

    def advances(self) -> None:
        for request, outcome in self.scheduler.advance(self.now):
            deadline = self.waiting.pop(request)  # once, and only those who wait
            if isinstance(outcome, Placement):
                self.given(outcome)
                assert deadline is None or deadline > self.now, "placed though nobody wants it any more"
            elif isinstance(outcome, DeadlineExceeded):
                assert deadline is not None
                assert deadline <= self.now
            else:
                assert isinstance(outcome, NoWorker | PromptTooLong)
        assert not any(deadline is not None and deadline <= self.now for deadline in self.waiting.values())
        silent = {worker.info.id for worker in self.scheduler.status(self.now).workers if not worker.alive}
        assert not self.waiting or self.free <= silent, "a worker idles while somebody waits"

    @invariant()
    def nobody_is_lost(self) -> None:
        self.scheduler.check()
        queues = self.scheduler.status(self.now).queues
        assert sum(queue.length for queue in queues) == len(self.waiting)
        assert all(queue.length <= bound for queue, bound in zip(queues, (3, 5, 3), strict=True))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


# ---- many -----------------------------------------------------------------------------------------------------


def churn(count: int) -> float:
    """CPU microseconds for each of `count` requests to come, wait among all others and leave."""
    admission = Admission(AdmissionPolicy(queue=(count, count, count)))
    drawn = random.Random(0)
    shapes = [
        shape(
            f"r{number}",
            priority=drawn.randint(-1, 1),
            tenant=f"t{drawn.randrange(count // 10)}",
            ttft_seconds=drawn.uniform(0, 100),
            deadline_seconds=1e6,
        )
        for number in range(count)
    ]
    began = time.process_time()
    for one in shapes:
        admission.add(one, 0.01, 0.0, assumed=1e9, ahead=0.0)
    for one in shapes[: count // 2]:
        admission.withdraw(one.request)
    while (turn := admission.next(50.0)) is not None:
        admission.charge(turn.waiting.rank, turn.waiting.shape.tenant, 0.01, chosen=True)
        admission.release(turn.waiting, 50.0)
    return (time.process_time() - began) / count * 1e6


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_a_request_among_very_many_costs_little_more_than_one_among_a_thousand(count: int) -> None:
    few, many = min(churn(1_000) for _ in range(5)), churn(count)
    print(f"\n{few:.0f} µs of CPU a request among 1,000, {many:.0f} among {count:,}")
    assert many < 6 * few
