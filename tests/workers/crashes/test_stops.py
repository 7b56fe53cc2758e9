"""A process that is stopped in the middle of a copy, and goes on after its lease, changes nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.workers.crashes.steady import Steady

if TYPE_CHECKING:
    from tests.workers.crashes.conftest import Society

Make = Callable[..., Any]
LEASE_SECONDS = 3.0
BLOCKS = 192
LENGTH = 2000
"""125 blocks, two parcels: what others need meanwhile lies where these were."""
STEADY_LENGTH = 600


@pytest.mark.parametrize(("link", "side"), [("gloo", "sender"), ("mapped", "receiver")])
def test_a_copy_that_goes_on_after_its_lease(
    run_long: Make, society: Make, bench: Make, prompt: Make, request_for: Make, link: str, side: str
) -> None:
    async def test() -> None:
        limits = {"link": link, "lease_seconds": LEASE_SECONDS, "memory_bytes": BLOCKS * 8192, "max_batch_tokens": 1024}
        async with society(**limits) as all_of_them:
            s: Society = all_of_them
            victim, survivor, other = await asyncio.gather(
                s.start("victim", in_copy=True), s.start("survivor"), s.start("other")
            )
            await s.meet(survivor, victim, other)
            await asyncio.gather(s.meet(victim, survivor), s.meet(other, survivor))
            prefill, decode = (victim, survivor) if side == "sender" else (survivor, victim)
            ends = (other, survivor) if side == "sender" else (survivor, other)
            steady = Steady(s, *ends, lambda number: request_for(prompt(STEADY_LENGTH, seed=number + 1), max_tokens=4))
            struck = await s.submit(request_for(prompt(LENGTH)), decode, prefill)
            await victim.wait_stopped()
            async with steady.at_work():
                await survivor.until(lambda look: struck.id not in look.handing)
                await steady.go_on(1 + BLOCKS // (STEADY_LENGTH // 16))  # every block was somebody else's meanwhile
                victim.send_signal(signal.SIGCONT)
                answers = [(struck, await s.answer(struck))]
                assert s.front.served(struck.id).how == "local"
                for number in range(2):
                    later = await s.submit(request_for(prompt(200, seed=1000 + number)), decode, prefill)
                    answers.append((later, await s.answer(later)))
                assert s.front.served(later.id).how == "remote"
            for member in (victim, survivor, other):
                await member.settle()
        answers += steady.answers
        assert bench().answers(*(request for request, _ in answers)) == [said for _, said in answers]

    run_long(test())
