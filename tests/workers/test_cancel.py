"""A cancel, wherever it finds the request, gives back every block on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

Make = Callable[..., Any]


class Gate:
    """Holds the calls that come by until it is opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, *_: object) -> None:
        self.reached.set()
        await self.opened.wait()


@pytest.fixture
def cancelled(pair: Make, prompt: Make, request_for: Make) -> Make:
    """(hook, length) → an async context: a request was cancelled when `hook` of a peer's calls was reached."""

    @asynccontextmanager
    async def make(side: str, when: str, name: str, length: int = 300) -> AsyncIterator[Any]:
        async with pair() as two:
            gate = Gate()
            getattr(getattr(two, side), when)[name] = gate
            request = request_for(prompt(length), max_tokens=50)
            await two.submit(request)
            await gate.reached.wait()
            yield two
            await two.d.cancel(request.id, 0)
            await two.until(two.d, lambda roles: not roles.engine.pool.owners())
            gate.opened.set()
            await two.settle()
            d, p = await two.counters(two.d), await two.counters(two.p)
            assert (d.requests_cancelled, d.requests_finished) == (1, 0)
            assert (d.transfers_failed, p.transfers_failed) == (0, 0)
            # The pair is as good as before.
            after = request_for(prompt(90, seed=9))
            await two.answers(after)
            assert two.front.served(after.id).how == "remote"
            assert (await two.counters(two.d)).transfers_failed == 0

    return make


def test_while_its_order_is_on_the_way(run: Make, cancelled: Make) -> None:
    async def test() -> None:
        async with cancelled("to_p", "before", "run"):
            pass

    run(test())


def test_while_it_prefills(run: Make, cancelled: Make) -> None:
    async def test() -> None:
        # Asked for on dequeue: of 7,000 tokens at least the last 256 are still to be computed.
        async with cancelled("to_d", "before", "grant", length=7000) as two:
            assert await two.see(two.p, lambda roles: roles.engine.pool.held) > 0

    run(test())


def test_while_what_was_computed_waits_for_room(run: Make, cancelled: Make) -> None:
    async def test() -> None:
        async with cancelled("to_d", "before", "grant") as two:
            await two.until(two.p, lambda roles: roles.engine.pool.lent == 19)

    run(test())


def test_while_its_ticket_is_on_the_way(run: Make, cancelled: Make) -> None:
    async def test() -> None:
        async with cancelled("to_d", "after", "grant") as two:
            assert await two.see(two.d, lambda roles: roles.engine.pool.granted) == 19

    run(test())


def test_while_its_blocks_are_on_the_link(run: Make, cancelled: Make) -> None:
    async def test() -> None:
        async with cancelled("to_d", "before", "expect") as two:
            await two.until(two.p, lambda roles: roles.engine.pool.lent == 19)
            assert (await two.counters(two.d)).blocks_received == 0

    run(test())


def test_while_prefill_does_not_know_that_it_landed(run: Make, cancelled: Make) -> None:
    async def test() -> None:
        async with cancelled("to_p", "before", "committed") as two:
            assert await two.see(two.p, lambda roles: roles.engine.pool.lent) == 19

    run(test())


def test_while_it_decodes(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            request = request_for(prompt(100), max_tokens=5000)
            await two.submit(request)
            await two.front.wait_for(lambda: two.front.count(request.id) > 3)
            await two.d.cancel(request.id, 0)
            await two.d.cancel(request.id, 0)
            await two.settle()
            d = await two.counters(two.d)
            assert (d.requests_cancelled, d.requests_finished, d.transfers_failed) == (1, 0, 0)

    run(test())


def test_while_it_is_queued(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair(decode={"max_running": 1}) as two:
            running, queued = request_for(prompt(10), max_tokens=5000), request_for(prompt(20, seed=1))
            await two.submit(running, two.local)
            await two.submit(queued, two.local)
            await two.until(two.d, lambda roles: len(roles.engine.batcher.waiting) == 1)
            await two.d.cancel(queued.id, 0)
            await two.until(two.d, lambda roles: not roles.engine.batcher.waiting)
            await two.d.cancel(running.id, 0)
            await two.settle()
            assert two.front.count(queued.id) == 0
            assert (await two.counters(two.d)).requests_cancelled == 2

    run(test())


def test_before_it_was_submitted(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            request = request_for(prompt(30))
            await two.d.cancel(request.id, 0)
            await two.submit(request)
            await two.d.submit(request, 1, two.remote)  # another attempt is another matter
            await two.until(two.d, lambda roles: roles.decode.counters.finished == 1)
            assert {each.attempt for each in two.front.said[request.id].values()} == {1}

    run(test())


def test_a_front_that_leaves_takes_its_requests_along(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            stream = two.d.outbox("other")
            await anext(stream)
            theirs = request_for(prompt(40), max_tokens=5000)
            object.__setattr__(theirs, "front", "other")
            ours = request_for(prompt(40, seed=1))
            await two.submit(theirs)
            assert await anext(stream)
            await stream.aclose()
            await two.answers(ours)
            await two.settle()
            assert (await two.counters(two.d)).requests_cancelled == 1

    run(test())
