"""A prompt's prefix out of another worker's cache: not computed again, and never a reason to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from diptych.errors import WorkerLost

Make = Callable[..., Any]


async def dies(*_: object) -> None:
    raise WorkerLost("gone")


async def is_lost(*_: object) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("link", ["gloo", "mapped", "loopback"])
@pytest.mark.parametrize(("prefill_block", "decode_block"), [(16, 16), (32, 16), (16, 32)])
def test_the_next_turn_is_prefilled_on_what_decode_has(
    run: Make,
    pair: Make,
    bench: Make,
    prompt: Make,
    request_for: Make,
    link: str,
    prefill_block: int,
    decode_block: int,
) -> None:
    """Decode computed the last answer: its KV exists nowhere else."""

    async def test() -> None:
        sizes = {"prefill": {"block_size": prefill_block}, "decode": {"block_size": decode_block}}
        async with pair(link=link, **sizes) as two:
            first = request_for(prompt(200), max_tokens=120)
            [said] = await two.answers(first, placement=two.local)
            turn = (*first.tokens, *(token.token for token in said), *prompt(40, seed=9))
            clean = bench().answers(request_for(turn))
            second = request_for(turn)
            assert await two.answers(second, placement=replace(two.remote, prefix_from="d")) == clean
            served = two.front.served(second.id)
            larger = max(prefill_block, decode_block)
            there = (200 + 120 - 1) // larger * larger
            assert (served.how, served.cached_tokens) == ("remote", there)
            assert served.prompt_tokens_computed == len(turn) - there
            await two.settle()
            committed = await two.see(two.p, lambda roles: roles.borrower.blocks_borrowed)
            assert committed == there // prefill_block

    run(test())


@pytest.mark.parametrize("link", ["gloo", "mapped"])
def test_decode_computes_on_a_prefix_that_prefill_has(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make, link: str
) -> None:
    clean = bench().answers(request_for(prompt(300)))

    async def test() -> None:
        async with pair(link=link) as two:
            # One token: prefill answers alone, and decode never sees the KV.
            await two.answers(request_for(prompt(300), max_tokens=1))
            request = request_for(prompt(300))
            assert await two.answers(request, placement=replace(two.local, prefix_from="p")) == clean
            served = two.front.served(request.id)
            assert (served.how, served.cached_tokens, served.prompt_tokens_computed) == ("local", 288, 12)

    run(test())


def test_only_as_much_comes_as_is_there(run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make) -> None:
    clean = bench().answers(request_for(prompt(300)))

    async def test() -> None:
        async with pair() as two:
            await two.answers(request_for(prompt(300)[:100], max_tokens=1))
            request = request_for(prompt(300))
            assert await two.answers(request, placement=replace(two.local, prefix_from="p")) == clean
            assert two.front.served(request.id).cached_tokens == 96

    run(test())


@pytest.mark.parametrize("fault", [dies, is_lost])
@pytest.mark.parametrize("name", ["lend", "expect", "returned"])
def test_a_prefix_that_does_not_come_is_computed(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make, name: str, fault: Any
) -> None:
    clean = bench().answers(request_for(prompt(200)))

    async def test() -> None:
        async with pair(lease_seconds=1.5) as two:
            await two.answers(request_for(prompt(200), max_tokens=1))
            wire = two.to_d if name == "expect" else two.to_p
            wire.before[name] = fault
            request = request_for(prompt(200))
            assert await two.answers(request, placement=replace(two.local, prefix_from="p")) == clean
            assert two.front.served(request.id).cached_tokens == (192 if name == "returned" else 0)
            await two.settle()

    run(test())


def test_a_cancel_while_the_prefix_is_on_its_way_leaves_nothing(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            await two.answers(request_for(prompt(200), max_tokens=1))
            asked = asyncio.Event()

            async def hold(*_: object) -> None:
                asked.set()
                await asyncio.Event().wait()

            two.to_p.before["lend"] = hold
            request = request_for(prompt(200))
            await two.submit(request, replace(two.local, prefix_from="p"))
            await asked.wait()
            await two.d.cancel(request.id, 0)
            await two.settle()

    run(test())


def test_nobody_to_borrow_from_and_nothing_to_borrow(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make
) -> None:
    clean = bench().answers(request_for(prompt(100)), request_for(prompt(7)))

    async def test() -> None:
        async with pair() as two:
            requests = request_for(prompt(100)), request_for(prompt(7))
            assert await two.answers(*requests, placement=replace(two.local, prefix_from="nobody")) == clean

    run(test())
