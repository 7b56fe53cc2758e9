"""A prompt computed on one worker and answered by another: the same bits, and only what has to move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

LENGTHS = (1, 15, 16, 17, 32, 300, 700)
BLOCK_BYTES = 8192

Make = Callable[..., Any]


def test_remote_local_and_mixed_answers_have_the_same_bits(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            for temperature in (0.0, 0.9):
                prompts = [prompt(length, seed=length) for length in LENGTHS]
                remote = await two.answers(*(request_for(each, temperature=temperature) for each in prompts))
                again = await two.answers(*(request_for(each, temperature=temperature) for each in prompts))
                local = await two.answers(
                    *(request_for(each, temperature=temperature) for each in prompts), placement=two.local
                )
                assert remote == again == local
        async with pair(decode={"role": "mixed"}) as other:
            alone = [request_for(each, temperature=0.9) for each in prompts]
            mixed = [(await other.answers(each, placement=other.local))[0] for each in alone]
        assert mixed == remote

    run(test())


def test_a_prompt_of_1000_tokens_sends_63_blocks_and_decode_computes_none_of_it(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            first, again = request_for(prompt(1000)), request_for(prompt(1000))
            await two.answers(first)
            served = two.front.served(first.id)
            assert (served.how, served.prefill_worker, served.decode_worker) == ("remote", "p", "d")
            assert (served.prompt_tokens_computed, served.cached_tokens) == (1000, 0)
            assert (served.kv_blocks_sent, served.kv_bytes_sent) == (63, 63 * BLOCK_BYTES)
            assert (await two.counters(two.d)).prompt_tokens_computed == 0

            await two.answers(again)
            served = two.front.served(again.id)
            assert (served.prompt_tokens_computed, served.cached_tokens) == (8, 992)
            assert (served.kv_blocks_sent, served.kv_bytes_sent) == (1, BLOCK_BYTES)

            await two.settle()
            p, d = await two.counters(two.p), await two.counters(two.d)
            assert (p.blocks_sent, p.bytes_sent) == (d.blocks_received, d.bytes_received) == (64, 64 * BLOCK_BYTES)
            assert (p.prompt_tokens_computed, p.prompt_tokens_cached) == (1008, 992)
            assert (d.prompt_tokens_computed, d.transfers_committed, d.transfers_failed) == (0, 2, 0)

    run(test())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32])
def test_every_block_of_a_short_prompt_is_sent_once(
    run: Make, pair: Make, prompt: Make, request_for: Make, length: int
) -> None:
    async def test() -> None:
        async with pair() as two:
            request = request_for(prompt(length))
            await two.answers(request)
            served = two.front.served(request.id)
            assert (served.prompt_tokens_computed, served.kv_blocks_sent) == (length, -(-length // 16))

    run(test())


def test_only_the_blocks_that_decode_lacks_are_sent(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            shared = prompt(160)
            await two.answers(request_for(shared), placement=two.local)
            request = request_for(shared + prompt(100, seed=1))
            await two.answers(request)
            served = two.front.served(request.id)
            assert (served.prompt_tokens_computed, served.kv_blocks_sent) == (260, 17 - 10)

    run(test())


def test_blocks_leave_while_the_rest_is_still_computed(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            # Twenty chunks of 256 tokens: the ticket is here long before the last of them.
            await two.answers(request_for(prompt(5000)))
            assert two.to_d.calls["expect"] > 1, "all blocks waited for the end of the prompt"
            transitions = await two.transitions(two.p)
            assert transitions["sending", "packing"] == two.to_d.calls["expect"] - 1

    run(test())


def test_the_first_token_is_out_before_any_block_has_landed(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            released = asyncio.Event()

            async def hold(*_: object) -> None:
                await released.wait()

            two.to_d.before["expect"] = hold
            request = request_for(prompt(100))
            await two.submit(request)
            await two.front.wait_for(lambda: two.front.count(request.id) == 1)
            assert (await two.counters(two.d)).blocks_received == 0
            released.set()
            await two.front.wait_for(lambda: two.front.is_over(request.id))

    run(test())


def test_an_answer_of_one_token_is_never_handed_over(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            request = request_for(prompt(100), max_tokens=1)
            ((token,),) = await two.answers(request)
            assert ((token,),) == tuple(map(tuple, await two.answers(request_for(prompt(100), 1), placement=two.local)))
            await two.settle()
            assert "grant" not in two.to_d.calls
            assert (await two.counters(two.p)).blocks_sent == 0
            assert (await two.counters(two.d)).requests_finished == 2

    run(test())


def test_an_answer_that_ends_at_its_first_token_is_over_on_both_sides(
    run: Make, pair: Make, prompt: Make, request_for: Make
) -> None:
    async def test() -> None:
        async with pair() as two:
            ((first, *_),) = await two.answers(request_for(prompt(100)), placement=two.local)
            request = request_for(prompt(100, seed=0), stop_token_ids=(first.token,))
            ((token,),) = await two.answers(request)
            assert token == first
            assert two.front.said[request.id][0].finish == "stop"
            await two.settle()
            assert (await two.counters(two.d)).transfers_failed == 0

    run(test())


@pytest.mark.parametrize("leases", [0, 2])
def test_a_hand_off_waits_while_decode_is_full_and_goes_on_then(
    run: Make, pair: Make, prompt: Make, request_for: Make, leases: int
) -> None:
    """However long: prefill asks again and again, and what it computed is not computed twice."""

    async def test() -> None:
        async with pair(decode={"max_running": 1}, lease_seconds=1.0 if leases else 10.0) as two:
            long, waiting = request_for(prompt(10), max_tokens=7000), request_for(prompt(50, seed=1))
            await two.submit(long, two.local)
            await two.submit(waiting)
            await two.until(two.d, lambda roles: [each.request for each in roles.engine.batcher.waiting] == [waiting])
            await two.until(two.p, lambda roles: roles.engine.pool.lent > 0)
            assert two.front.count(waiting.id) <= 1
            asked = two.to_d.calls["is_granting"]
            while two.to_d.calls["is_granting"] < asked + 2 * leases:  # noqa: ASYNC110 (twice in a lease)
                await asyncio.sleep(0.01)
            await two.d.cancel(long.id, 0)
            await two.front.wait_for(lambda: two.front.is_over(waiting.id))
            assert two.front.served(waiting.id).how == "remote"
            await two.settle()
            assert (await two.counters(two.d)).transfers_failed == 0

    run(test())


def test_many_at_once_all_end_and_leave_nothing(run: Make, pair: Make, prompt: Make, request_for: Make) -> None:
    async def test() -> None:
        async with pair() as two:
            requests = [request_for(prompt(20 + 7 * number, seed=number), max_tokens=8) for number in range(48)]
            remote = await two.answers(*requests)
            local = await two.answers(
                *(request_for(each.tokens, max_tokens=8) for each in requests), placement=two.local
            )
            assert remote == local

    run(test())


def test_a_worker_in_the_place_of_another_sends_its_own_kv(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make
) -> None:
    """Its blocks have the numbers and the generations that those of the one before it had."""

    async def test() -> None:
        requests = [request_for(prompt(40, seed=seed)) for seed in range(1, 25)]
        async with pair(link="loopback", verify="off") as two:
            await two.answers(request_for(prompt(1000)))
            await two.replace_prefill()
            # One after the other: each has a parcel of its own.
            answers = [(await two.answers(request))[0] for request in requests]
            assert {two.front.served(request.id).how for request in requests} == {"remote"}
            assert (await two.counters(two.d)).transfers_failed == 0
        assert answers == bench().answers(*requests)

    run(test())
