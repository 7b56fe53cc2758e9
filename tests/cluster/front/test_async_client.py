"""Our asyncio client against the real gRPC front: what it asks, raises and gives back."""

from __future__ import annotations

import asyncio
import socket
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from diptych import AsyncClient
from diptych.calls import Unreachable
from diptych.errors import DeadlineExceeded, InvalidRequest, Overloaded, PromptTooLong

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

HELLO = [{"role": "user", "content": "hello"}]
WAIT_SECONDS = 10


def test_it_says_and_is_told_what_the_blocking_client_is(wire: Wire, service: ScriptedService) -> None:
    async def talk() -> None:
        async with AsyncClient(wire.target) as client:
            *chunks, last = [response async for response in client.generate("hello", max_tokens=50, seed=4)]
            assert "".join(chunk.chunk.text for chunk in chunks) == "Grüß Gott"
            assert last.complete.usage.completion_tokens == 11
            assert await client.ask("hello", system="be brief") == "Grüß Gott"
            assert await client.tokenize("ab") == (97, 98)
            assert await client.detokenize((97, 98)) == "ab"
            assert [model.id for model in await client.models()] == ["tiny"]
            assert len((await client.status()).workers) == 2

    asyncio.run(talk())
    assert (service.asks[0].params.max_tokens, service.asks[0].params.seed) == (50, 4)


def test_answers_run_side_by_side(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 2

    async def talk() -> None:
        async with AsyncClient(wire.target) as client:
            answers = [client.generate("hello") for _ in range(8)]
            assert [(await anext(answer)).chunk.text for answer in answers] == ["G"] * 8
            for answer in answers:
                await answer.aclose()

    asyncio.run(talk())


def test_it_raises_what_the_front_raised(wire: Wire, service: ScriptedService) -> None:
    async def talk() -> None:
        async with AsyncClient(wire.target) as client:
            with pytest.raises(PromptTooLong, match="at most 507") as refused:
                await anext(client.generate("hello", max_tokens=600))
            assert refused.value.param == "sampling.max_tokens"
            with pytest.raises(InvalidRequest, match="vocabulary of 260"):
                await client.detokenize((9999,))
            service.fail_at, service.error = 3, Overloaded("full", retry_after=2.5)
            with pytest.raises(Overloaded, match="full") as full:
                await client.ask("hello")
            assert full.value.retry_after == 2.5

    asyncio.run(talk())


def test_closing_an_answer_closes_its_generator(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 2

    async def talk() -> None:
        async with AsyncClient(wire.target) as client, aclosing(client.generate(messages=HELLO)) as answer:
            await anext(answer)

    asyncio.run(talk())
    service.closed.put(service.closed.get(timeout=WAIT_SECONDS))


def test_its_deadline_is_each_calls(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 0

    async def talk() -> None:
        async with AsyncClient(wire.target, timeout_seconds=0.3) as client:
            with pytest.raises(DeadlineExceeded):
                await client.ask("hello")

    asyncio.run(talk())


def test_nobody_there_is_said_at_once_and_silence_after_a_bound() -> None:
    async def refused(target: str, connect_timeout_seconds: float) -> None:
        async with AsyncClient(target, connect_timeout_seconds=connect_timeout_seconds) as client:
            with pytest.raises(Unreachable, match=f"{target}; is `diptych serve` running"):
                await client.status()

    with socket.socket() as free, socket.create_server(("127.0.0.1", 0)) as silent:
        free.bind(("127.0.0.1", 0))
        asyncio.run(refused(f"127.0.0.1:{free.getsockname()[1]}", WAIT_SECONDS))
        asyncio.run(refused(f"127.0.0.1:{silent.getsockname()[1]}", 0.2))
