"""Prefill and decode on two hosts: other addresses, other network stacks, and a cable that is slow, lossy or cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.workers.crashes.conftest import fork_server, run_long, society
from tests.workers.hosts.wire import Wire, why_not

if TYPE_CHECKING:
    from diptych.types import Request
    from tests.workers.conftest import Token
    from tests.workers.crashes.conftest import Member, Society

__all__ = ["fork_server", "run_long", "society"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=f"two hosts: {why_not()}")]

Make = Callable[..., Any]
LEASE_SECONDS = 3.0
LENGTH = 1000
"""63 blocks, half a megabyte."""
TICK_SECONDS = 1.5
"""On top of a lease: an engine at rest looks at leases every 0.25 s; the machine is shared."""


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as wire:
        yield wire


class Hosts:
    """Prefill on the first, decode on the second; their calls go another way, as Ray's do."""

    def __init__(self, society: Society, prefill: Member, decode: Member) -> None:
        self.society = society
        self.prefill = prefill
        self.decode = decode
        self.answers: list[tuple[Request, list[Token]]] = []

    async def ask(self, request: Request) -> str:
        """How it was served."""
        await self.society.submit(request, self.decode, self.prefill)
        self.answers.append((request, await self.society.answer(request)))
        return self.society.front.served(request.id).how


@pytest.fixture
def hosts(society: Make, wire: Wire) -> Make:
    @asynccontextmanager
    async def make() -> AsyncIterator[Hosts]:
        async with society(link="auto", lease_seconds=LEASE_SECONDS, memory_bytes=512 * 8192) as everybody:
            names = zip(("prefill", "decode"), wire.names, wire.addresses, strict=True)
            started = (everybody.start(name, namespace=where, host=host) for name, where, host in names)
            prefill, decode = await asyncio.gather(*started)
            await everybody.meet(prefill, decode)
            await everybody.meet(decode, prefill)
            it = Hosts(everybody, prefill, decode)
            yield it
            for member in (prefill, decode):
                await member.settle()

    return make


def test_answers_over_a_slow_and_lossy_cable_are_exact(
    run_long: Make, hosts: Make, wire: Wire, bench: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        wire.delay_seconds, wire.loss = 0.02, 0.01
        async with hosts() as it:
            hows = [await it.ask(request_for(prompt(LENGTH, seed=seed))) for seed in range(4)]
            assert "remote" in hows, it.prefill
        print(f"{hows}: {wire.passed} frames passed, {wire.lost} were lost")
        assert wire.lost > 0
        assert bench().answers(*(request for request, _ in it.answers)) == [said for _, said in it.answers]

    run_long(test())


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_cut_cable_costs_a_lease_and_a_mended_one_is_used_again(
    run_long: Make, hosts: Make, wire: Wire, bench: Make, prompt: Make, request_for: Make, when: str
) -> None:
    async def test() -> None:
        wire.delay_seconds = 0.02
        async with hosts() as it:
            assert await it.ask(request_for(prompt(LENGTH, seed=1))) == "remote"
            struck = asyncio.ensure_future(it.ask(request_for(prompt(LENGTH, seed=2)))) if when == "during" else None
            if struck:
                seen = wire.passed
                while wire.passed < seen + 20:  # noqa: ASYNC110 (a thread counts)
                    await asyncio.sleep(0.001)
            wire.cut, begun = True, time.monotonic()
            how = await (struck or it.ask(request_for(prompt(LENGTH, seed=2))))
            seconds = time.monotonic() - begun
            print(f"cut {when} a hand-off: answered {how} after {seconds:.2f} s, lease {LEASE_SECONDS} s")
            assert seconds < LEASE_SECONDS + TICK_SECONDS
            wire.cut = False
            mended = [await it.ask(request_for(prompt(LENGTH, seed=seed))) for seed in (3, 4)]
            assert mended[-1] == "remote"
        assert bench().answers(*(request for request, _ in it.answers)) == [said for _, said in it.answers]

    run_long(test())
