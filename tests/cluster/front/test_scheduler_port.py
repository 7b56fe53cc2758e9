"""A front asks a scheduler that may die or hang: it asks the next one, and gives up within a bound."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.front.scheduler_calls import SchedulerCalls, SchedulerSilent
from cluster.scheduler.costs import RequestShape
from diptych.errors import NoWorker, Overloaded, WorkerLost
from diptych.types import Placement, RequestId, WorkerId


class Handle:
    """What a Ray handle looks like from here: `status.remote()` is awaited."""

    def __init__(self, answer: str | Exception | None) -> None:
        self.answer = answer
        self.asked = asyncio.Event()

    @property
    def status(self) -> Handle:
        return self

    def remote(self) -> asyncio.Future[str]:
        self.asked.set()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        elif self.answer is not None:
            future.set_result(self.answer)
        return future


@pytest.mark.parametrize("first", [WorkerLost("the scheduler died"), None], ids=["dead", "hanging"])
def test_a_call_that_waits_is_made_again_to_the_next_scheduler(first: Exception | None) -> None:
    async def test() -> Any:
        old, new = Handle(first), Handle("placed")
        calls = SchedulerCalls(old, timeout_seconds=30)
        asking = asyncio.ensure_future(calls.status())
        await old.asked.wait()
        calls.replace(new)
        return await asking

    assert asyncio.run(test()) == "placed"


def test_without_a_next_one_it_is_an_error_that_invites_to_try_again() -> None:
    async def test() -> None:
        await SchedulerCalls(Handle(WorkerLost("died")), timeout_seconds=0.05).status()

    with pytest.raises(NoWorker, match=r"did not answer for 0\.05 s"):
        asyncio.run(test())


def test_what_a_living_scheduler_answers_is_the_answer() -> None:
    async def test() -> None:
        await SchedulerCalls(Handle(NoWorker("no pair")), timeout_seconds=30).status()

    with pytest.raises(NoWorker, match="no pair"):
        asyncio.run(test())


# ---- a call that waits for its turn -------------------------------------------------------------------------

SHAPE = RequestShape(request=RequestId("r"), granules=(), prompt_tokens=1, max_tokens=1)
PLACED = Placement(decode=WorkerId("d"), prefill=None, how="local", reason="")


class Method:
    """`remote()` answers as its scheduler does."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class Scheduler:
    """A handle whose `place` answers when a test says so; `silent` ones answer nothing."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.turn: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self.asked = asyncio.Event()
        self.checks = 0
        self.checked_often = asyncio.Event()
        self.withdrawn: list[str] = []
        self.place, self.is_waiting, self.withdraw = (
            Method(call) for call in (self._place, self._is_waiting, self._withdraw)
        )

    async def _place(self, shape: RequestShape) -> Placement:
        self.asked.set()
        return await asyncio.shield(self.turn)

    async def _is_waiting(self, request: RequestId) -> bool:
        self.checks += 1
        if self.checks == 3:
            self.checked_often.set()
        return not self.turn.done() if not self.silent else await asyncio.Event().wait()

    async def _withdraw(self, request: RequestId) -> None:
        self.withdrawn.append(request)


def calls_to(scheduler: Scheduler) -> SchedulerCalls:
    return SchedulerCalls(scheduler, timeout_seconds=30, silent_seconds=0.05)


def test_a_long_wait_is_no_silence_as_long_as_the_scheduler_says_that_it_waits() -> None:
    async def test() -> tuple[Placement, int]:
        scheduler = Scheduler()
        asking = asyncio.ensure_future(calls_to(scheduler).place(SHAPE))
        await scheduler.checked_often.wait()
        scheduler.turn.set_result(PLACED)
        return await asking, scheduler.checks

    placement, checks = asyncio.run(test())
    assert placement == PLACED
    assert checks >= 3


def test_a_scheduler_that_does_not_even_say_so_is_silent() -> None:
    async def test() -> None:
        await calls_to(Scheduler(silent=True)).place(SHAPE)

    with pytest.raises(SchedulerSilent, match=r"did not answer for 0\.05 s"):
        asyncio.run(test())


def test_a_dead_one_without_successor_is_silent_and_with_one_the_place_in_the_queue_is_asked_for_again() -> None:
    async def test(successor: bool) -> Placement:
        old, new = Scheduler(), Scheduler()
        calls = calls_to(old)
        asking = asyncio.ensure_future(calls.place(SHAPE))
        await old.asked.wait()
        old.turn.set_exception(WorkerLost("died"))
        if successor:
            calls.replace(new)
            await new.asked.wait()
            new.turn.set_result(PLACED)
        return await asking

    assert asyncio.run(test(successor=True)) == PLACED
    with pytest.raises(SchedulerSilent):
        asyncio.run(test(successor=False))


def test_a_refusal_is_passed_on() -> None:
    async def test() -> None:
        scheduler = Scheduler()
        scheduler.turn.set_exception(Overloaded("full", retry_after=3.0))
        await calls_to(scheduler).place(SHAPE)

    with pytest.raises(Overloaded, match="full"):
        asyncio.run(test())


def test_withdrawing_from_a_scheduler_that_hangs_is_given_up() -> None:
    async def test() -> None:
        scheduler = Scheduler()
        scheduler.withdraw = Method(lambda request: asyncio.Event().wait())
        await calls_to(scheduler).withdraw(RequestId("r"))

    asyncio.run(test())
