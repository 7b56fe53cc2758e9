"""One timer for many waits: each ends at its own time, and a cancel stays a cancel."""

from __future__ import annotations

import asyncio

import pytest

from cluster.front.patience import Patience

LONG_SECONDS = 30.0


async def ready(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_what_comes_in_time_comes_through() -> None:
    async def waits() -> list[int]:
        patience = Patience()
        return [await patience.wait(ready(value), LONG_SECONDS) for value in range(100)]

    assert asyncio.run(waits()) == list(range(100))


def test_what_comes_too_late_is_a_timeout_and_is_cancelled() -> None:
    async def waits() -> None:
        patience, never = Patience(), asyncio.Event()
        for _ in range(3):  # the task lives on and may wait again
            with pytest.raises(TimeoutError):
                await patience.wait(never.wait(), 0.01)
        assert await patience.wait(ready(5), LONG_SECONDS) == 5
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0

    asyncio.run(waits())


def test_each_of_many_waits_ends_at_its_own_time() -> None:
    async def waits() -> list[str]:
        patience, ended, never = Patience(), list[str](), asyncio.Event()

        async def one(name: str, seconds: float) -> None:
            with pytest.raises(TimeoutError):
                await patience.wait(never.wait(), seconds)
            ended.append(name)

        async def in_time() -> None:
            await patience.wait(asyncio.sleep(0.01), LONG_SECONDS)
            ended.append("in time")

        await asyncio.gather(one("last", 0.3), one("first", 0.05), in_time(), one("second", 0.15))
        return ended

    assert asyncio.run(waits()) == ["in time", "first", "second", "last"]


def test_a_cancel_from_outside_is_no_timeout() -> None:
    async def waits() -> None:
        patience, never = Patience(), asyncio.Event()
        task = asyncio.ensure_future(patience.wait(never.wait(), LONG_SECONDS))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(waits())


def test_a_cancel_on_top_of_a_timeout_wins() -> None:
    async def waits() -> None:
        patience, never = Patience(), asyncio.Event()

        async def stubborn() -> None:
            try:
                await never.wait()
            finally:
                task.cancel()  # while the timeout's own cancel is on its way

        task = asyncio.ensure_future(patience.wait(stubborn(), 0.01))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(waits())


def test_an_error_comes_through_as_it_is() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("mine")

    async def waits() -> None:
        with pytest.raises(LookupError, match="mine"):
            await Patience().wait(fail(), LONG_SECONDS)

    asyncio.run(waits())
