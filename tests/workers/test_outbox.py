"""One stream per front: everything in order, nothing after it left, nobody left waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from diptych.types import Emission, FrontId, RequestId
from workers.outbox import Outbox

FRONT = FrontId("front")


def emission(index: int) -> Emission:
    return Emission(RequestId("r"), 0, 0, index, index)


def step(*indices: int) -> dict[FrontId, list[Any]]:
    return {FRONT: [emission(index) for index in indices]}


def indices(items: tuple[Any, ...]) -> list[int]:
    return [item.index for item in items]


def test_a_reader_gets_one_tuple_for_all_that_came_since(run: Callable[..., Any]) -> None:
    async def test() -> None:
        outbox = Outbox(lambda _: None)
        stream = outbox.read(FRONT)
        assert await anext(stream) == ()
        outbox.put(step(0))
        outbox.put(step(1, 2))
        assert indices(await anext(stream)) == [0, 1, 2]
        outbox.put(step(3))
        assert indices(await anext(stream)) == [3]
        await stream.aclose()

    run(test())


def test_nothing_is_kept_for_a_front_that_does_not_read(run: Callable[..., Any]) -> None:
    async def test() -> None:
        left: list[FrontId] = []
        outbox = Outbox(left.append)
        outbox.put(step(0))
        stream = outbox.read(FRONT)
        await anext(stream)
        outbox.put(step(1))
        assert indices(await anext(stream)) == [1]
        await stream.aclose()
        assert left == [FRONT]
        outbox.put(step(2))

    run(test())


def test_at_the_end_a_reader_gets_what_is_left_even_when_it_was_slow(run: Callable[..., Any]) -> None:
    async def test() -> None:
        outbox = Outbox(lambda _: None)
        slow, waiting = outbox.read(FRONT), outbox.read(FrontId("other"))
        assert [await anext(slow), await anext(waiting)] == [(), ()]
        rest = asyncio.ensure_future(anext(waiting, None))
        outbox.put(step(0))
        assert indices(await anext(slow)) == [0]
        outbox.put(step(1))
        outbox.close()
        assert await rest is None
        assert indices(await anext(slow)) == [1]
        assert await anext(slow, None) is None
        await outbox.wait_empty()

    run(test())


def test_who_reads_under_a_known_name_takes_over_and_the_first_reader_ends(run: Callable[..., Any]) -> None:
    async def test() -> None:
        left: list[FrontId] = []
        outbox = Outbox(left.append)
        first = outbox.read(FRONT)
        await anext(first)
        ends = asyncio.ensure_future(anext(first, None))
        await asyncio.sleep(0)
        second = outbox.read(FRONT)
        await anext(second)
        assert left == [FRONT]  # what the first one had asked for is cancelled before the second asks
        outbox.put(step(0))
        assert indices(await anext(second)) == [0]
        assert await ends is None
        assert left == [FRONT]
        await second.aclose()
        assert left == [FRONT, FRONT]

    run(test())


def test_a_front_that_is_forgotten_holds_nothing_up(run: Callable[..., Any]) -> None:
    async def test() -> None:
        outbox = Outbox(lambda _: None)
        stream = outbox.read(FRONT)
        await anext(stream)
        outbox.forget(FRONT)  # its process died: nobody closes the stream
        outbox.put(step(0))
        outbox.close()
        await asyncio.wait_for(outbox.wait_empty(), 5)
        assert [items async for items in stream] == []

    run(test())
