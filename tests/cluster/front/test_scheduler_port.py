"""A front asks a scheduler that may die or hang: it asks the next one, and gives up within a bound."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.front.scheduler_calls import SchedulerCalls
from diptych.errors import NoWorker, WorkerLost


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
