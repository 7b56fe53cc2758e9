"""Calls to peers always end in an answer for the engine: the peer's, or why there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from diptych.errors import Internal, TransferFailed, WorkerLost
from diptych.types import PrefillOrder, WorkerId
from workers.calls import Calls

Make = Callable[..., Any]
LEASE_SECONDS = 0.1
PEER = WorkerId("p")


class Peer:
    """Answers `run` as scripted; `is_pending` in turn, the last for ever."""

    def __init__(self, run: Callable[[], Any], pending: tuple[bool, ...] = (True,)) -> None:
        self._run = run
        self._pending = list(pending)
        self.asked = asyncio.Event()

    async def run(self, _: object) -> Any:
        return await self._run()

    async def is_pending(self, *_: object) -> bool:
        self.asked.set()
        return self._pending.pop(0) if len(self._pending) > 1 else self._pending[0]


@pytest.fixture
def ordered(prompt: Make, request_for: Make) -> Make:
    """(peer) → what the engine hears of an order."""

    async def order(peer: Peer | None) -> Any:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        calls = Calls(lambda then, answer: then(answer), LEASE_SECONDS)
        if peer:
            calls.meet({PEER: peer})
        wanted = PrefillOrder(request=request_for(prompt(5)), attempt=0, decode=WorkerId("d"))
        calls.wait(
            PEER,
            lambda peer: peer.run(wanted),
            lambda peer: peer.is_pending(wanted.request.id, wanted.attempt),
            heard.put_nowait,
        )
        answer = await heard.get()
        calls.close()
        assert heard.empty()
        return answer

    return order


async def never() -> None:
    await asyncio.Event().wait()


def test_an_order_is_waited_for_as_long_as_the_peer_has_it(run: Make, ordered: Make) -> None:
    async def test() -> None:
        done = asyncio.Event()

        async def answer() -> str:
            await done.wait()
            return "done"

        peer = Peer(answer)
        waiting = asyncio.ensure_future(ordered(peer))
        for _ in range(3):
            peer.asked.clear()
            await peer.asked.wait()
        assert not waiting.done()
        done.set()
        assert await waiting == "done"

    run(test())


def test_an_order_that_the_peer_forgot_is_lost(run: Make, ordered: Make) -> None:
    async def test() -> None:
        answer = await ordered(Peer(never, pending=(True, False)))
        assert isinstance(answer, WorkerLost)
        assert "lost the call" in str(answer)

    run(test())


def test_an_answer_that_left_before_the_peer_forgot_the_order_counts(run: Make, ordered: Make) -> None:
    async def test() -> None:
        async def answer() -> str:
            await peer.asked.wait()
            await asyncio.sleep(LEASE_SECONDS / 10)
            return "late"

        peer = Peer(answer, pending=(False,))
        assert await ordered(peer) == "late"

    run(test())


@pytest.mark.parametrize(("raised", "heard"), [(TransferFailed("no"), TransferFailed), (ValueError("a bug"), Internal)])
def test_what_a_peer_raises_is_an_answer(run: Make, ordered: Make, raised: Exception, heard: type) -> None:
    async def test() -> None:
        async def answer() -> None:
            raise raised

        error = await ordered(Peer(answer))
        assert isinstance(error, heard)
        assert str(raised) in str(error)

    run(test())


def test_a_stranger_is_lost_at_once(run: Make, ordered: Make) -> None:
    async def test() -> None:
        assert isinstance(await ordered(None), WorkerLost)

    run(test())


def test_a_short_call_ends_within_the_lease(run: Make) -> None:
    async def test() -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        calls = Calls(lambda then, answer: then(answer), LEASE_SECONDS)
        calls.meet({PEER: Peer(never)})

        async def bug(_: object) -> None:
            raise KeyError("a bug")

        calls.call(PEER, lambda _: never(), heard.put_nowait)
        calls.call(PEER, bug, heard.put_nowait)
        kinds = {type(await heard.get()) for _ in range(2)}
        assert kinds == {WorkerLost, Internal}
        calls.close()

    run(test())


def test_after_the_end_nothing_begins_and_what_was_under_way_is_ended(run: Make) -> None:
    async def test() -> None:
        heard: list[object] = []
        calls = Calls(lambda then, answer: then(answer), LEASE_SECONDS)
        begun, ended = asyncio.Event(), asyncio.Event()

        async def wait(_: object) -> None:
            begun.set()
            try:
                await never()
            finally:
                ended.set()

        calls.meet({PEER: Peer(never)})
        calls.call(PEER, wait, heard.append)
        await begun.wait()
        calls.close()
        calls.call(PEER, wait, heard.append)
        await ended.wait()
        await asyncio.sleep(2 * LEASE_SECONDS)
        assert heard == []

    run(test())
