"""How answers went reaches the scheduler in batches, and never makes a client wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cluster.front.outcomes import Outcomes, Watch
from diptych.errors import WorkerLost
from diptych.types import Emission, Outcome, RequestId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

WAIT_SECONDS = 10.0


class Scheduler:
    """Hears outcomes as the test says."""

    def __init__(self, on_batch: Callable[[int], Awaitable[None]]) -> None:
        self.batches: list[tuple[Outcome, ...]] = []
        self.on_batch = on_batch
        self.heard = asyncio.Condition()

    async def finished(self, outcomes: tuple[Outcome, ...]) -> None:
        self.batches.append(outcomes)
        async with self.heard:
            self.heard.notify_all()
        await self.on_batch(len(self.batches))

    async def until(self, count: int) -> None:
        async with self.heard:
            await asyncio.wait_for(self.heard.wait_for(lambda: sum(map(len, self.batches)) >= count), WAIT_SECONDS)


async def at_once(_: int) -> None:
    """Takes it."""


async def fails_first(batch: int) -> None:
    if batch == 1:
        raise WorkerLost("the scheduler died")


def outcome(number: int) -> Outcome:
    return Watch(RequestId(f"r{number}")).outcome()


def test_many_ends_are_few_messages_in_order() -> None:
    async def test() -> None:
        scheduler = Scheduler(at_once)
        outcomes = Outcomes(scheduler)
        for number in range(150):
            outcomes.add(outcome(number))
        await scheduler.until(150)
        assert [len(batch) for batch in scheduler.batches] == [64, 64, 22]
        assert [each.request for batch in scheduler.batches for each in batch] == [f"r{at}" for at in range(150)]
        outcomes.add(outcome(150))
        await scheduler.until(151)

    asyncio.run(test())


def test_a_scheduler_that_dies_loses_what_it_was_told_and_nothing_else() -> None:
    async def test() -> None:
        scheduler = Scheduler(fails_first)
        outcomes = Outcomes(scheduler)
        for number in range(65):
            outcomes.add(outcome(number))
        await scheduler.until(65)
        assert [batch[0].request for batch in scheduler.batches] == ["r0", "r64"]

    asyncio.run(test())


def test_a_scheduler_that_hangs_holds_nobody_up_and_little_memory() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def hangs(batch: int) -> None:
            if batch == 1:
                await gate.wait()

        scheduler = Scheduler(hangs)
        outcomes = Outcomes(scheduler)
        outcomes.add(outcome(-1))
        await scheduler.until(1)
        for number in range(10_000):
            outcomes.add(outcome(number))
        gate.set()
        await scheduler.until(1 + 4096)
        kept = [each.request for batch in scheduler.batches[1:] for each in batch]
        assert kept == [f"r{at}" for at in range(10_000 - 4096, 10_000)]

    asyncio.run(test())


def test_times_are_from_the_last_placement_and_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 1.0, 3.0, 3.5, 4.5, 5.5, 9.0, 9.0))
    monkeypatch.setattr("cluster.front.outcomes.time.monotonic", lambda: next(times))
    watch = Watch(RequestId("r"))
    watch.placed()
    watch.placed()
    for index in range(3):
        watch.heard([Emission(RequestId("r"), 1, 0, index, 7)])
    assert watch.outcome("cancelled") == Outcome(RequestId("r"), 3.0, 0.5, 1.0, 3, None, "cancelled")


def test_without_a_token_there_is_no_time_to_it() -> None:
    told = outcome(0)
    assert (told.ttft_seconds, told.itl_seconds, told.tokens, told.served) == (None, None, 0, None)
