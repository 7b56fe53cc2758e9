"""One hand-off over every link, and between workers whose KV differs: the answer is the one computed in one place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diptych.errors import LayoutMismatch

Make = Callable[..., Any]
LINKS = ("gloo", "mapped", "loopback")


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("prefill_block", "decode_block"), [(16, 16), (16, 32), (32, 16), (64, 32)])
def test_fp32_answers_have_the_bits_of_a_local_run(
    run: Make,
    pair: Make,
    bench: Make,
    prompt: Make,
    request_for: Make,
    link: str,
    prefill_block: int,
    decode_block: int,
) -> None:
    prompts = [prompt(length, seed=length) for length in (5, 16, 17, 96, 300)]
    clean = bench().answers(*(request_for(each) for each in prompts))

    async def test() -> None:
        sizes = {"prefill": {"block_size": prefill_block}, "decode": {"block_size": decode_block}}
        async with pair(link=link, max_batch_tokens=96, **sizes) as two:
            requests = [request_for(each) for each in prompts]
            assert await two.answers(*requests) == clean
            assert {two.front.served(each.id).how for each in requests} == {"remote"}
            again = [request_for(each) for each in prompts]
            assert await two.answers(*again) == clean
            sent = [two.front.served(each.id).kv_bytes_sent for each in requests]
            later = [two.front.served(each.id).kv_bytes_sent for each in again]
            assert sum(later) < sum(sent) / 2, "what decode has is not sent again"
            await two.settle()
            for worker in (two.p, two.d):
                assert (await two.counters(worker)).transfers_committed in (0, 10)
                assert (await two.counters(worker)).transfers_failed == 0

    run(test())


@pytest.mark.parametrize("link", LINKS)
def test_a_follow_up_sends_only_what_is_new(run: Make, pair: Make, prompt: Make, request_for: Make, link: str) -> None:
    async def test() -> None:
        async with pair(link=link) as two:
            first = request_for(prompt(320), max_tokens=20)
            [said] = await two.answers(first)
            assert two.front.served(first.id).kv_blocks_sent == 20
            turn = (*first.tokens, *(token.token for token in said), *prompt(30, seed=9))
            second = request_for(turn)
            await two.answers(second)
            # decode has the first prompt and its own answer but the last token: 339 tokens are 21 blocks.
            assert two.front.served(second.id).kv_blocks_sent == -(-len(turn) // 16) - 21

    run(test())


@pytest.mark.parametrize("link", LINKS)
def test_fp32_to_bf16_is_a_local_run_on_rounded_kv(
    run: Make, pair: Make, prompt: Make, request_for: Make, link: str
) -> None:
    """What lands is what the sender has, rounded once."""

    async def test() -> None:
        async with pair(link=link, prefill={"dtype": "fp32"}, decode={"dtype": "bf16"}) as two:
            request = request_for(prompt(64), max_tokens=2, fingerprint=False)
            await two.answers(request)
            await two.settle()
            assert two.front.served(request.id).how == "remote"
            there = await two.see(two.p, lambda roles: held(roles, request))
            here = await two.see(two.d, lambda roles: held(roles, request))
            assert here.dtype != there.dtype
            assert here.equal(there.to(here.dtype))

    run(test())


@pytest.mark.parametrize("link", LINKS)
def test_a_cache_in_fp8_lands_as_it_lies(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make, link: str
) -> None:
    """Every byte of it, and the answer is the one of a cache in fp8 in one place."""
    prompts = [prompt(length, seed=length) for length in (5, 16, 17, 96, 300)]
    clean = bench("fp8").answers(*(request_for(each) for each in prompts))

    async def test() -> None:
        async with pair(link=link, kv="fp8", max_batch_tokens=96, decode={"block_size": 32}) as two:
            requests = [request_for(each) for each in prompts]
            assert await two.answers(*requests) == clean
            assert {two.front.served(each.id).how for each in requests} == {"remote"}
        async with pair(link=link, kv="fp8") as two:
            request = request_for(prompt(64), max_tokens=2)
            await two.answers(request)
            await two.settle()
            there = await two.see(two.p, lambda roles: held(roles, request))
            here = await two.see(two.d, lambda roles: held(roles, request))
            assert here.dtype == torch.float8_e4m3fn
            assert here.float().any()
            assert here.view(torch.uint8).equal(there.view(torch.uint8))

    run(test())


@pytest.mark.parametrize("link", LINKS)
def test_a_cache_in_fp8_has_twice_the_blocks_and_moves_half_the_bytes_of_bf16(
    run: Make, pair: Make, prompt: Make, request_for: Make, link: str
) -> None:
    async def test() -> None:
        moved, room = {}, {}
        for kv in ("auto", "fp8"):
            async with pair(link=link, dtype="bf16", kv=kv) as two:
                request = request_for(prompt(160), fingerprint=False)
                await two.answers(request)
                await two.settle()
                served = two.front.served(request.id)
                assert (served.how, served.kv_blocks_sent) == ("remote", 10)
                sent, received = [await two.counters(worker) for worker in (two.p, two.d)]
                assert sent.bytes_sent == received.bytes_received == served.kv_bytes_sent
                moved[kv], room[kv] = served.kv_bytes_sent, two.d.info.blocks
        assert moved["fp8"] * 2 == moved["auto"]
        assert room["fp8"] == room["auto"] * 2

    run(test())


@pytest.mark.parametrize("narrow", ["prefill", "decode"])
def test_fp8_on_one_side_is_refused_naming_both(run: Make, pair: Make, narrow: str) -> None:
    async def test() -> None:
        async with pair(**{narrow: {"kv": "fp8"}}) as two:
            for worker, other in ((two.p, "d"), (two.d, "p")):
                met = await two.see(worker, lambda roles, other=other: roles.receiver._sources[other])
                assert isinstance(met, LayoutMismatch)
                assert all(side in str(met) for side in ("dtype='fp8'", "dtype='fp32'", "fp8 is for both or neither"))

    run(test())


@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
def test_a_quantised_wire_moves_about_half_the_bytes(
    run: Make, pair: Make, prompt: Make, request_for: Make, wire: str
) -> None:
    async def test() -> None:
        moved = {}
        for numbers in ("native", wire):
            async with pair(link="gloo", dtype="bf16", wire=numbers) as two:
                request = request_for(prompt(160), fingerprint=False)
                await two.answers(request)
                served = two.front.served(request.id)
                assert (served.how, served.kv_blocks_sent) == ("remote", 10)
                moved[numbers] = served.kv_bytes_sent
        # A byte for each number, and a scale of two for each head of 16: half plus a sixteenth.
        assert moved[wire] == moved["native"] * 9 // 16

    run(test())


def test_a_link_that_can_not_be_had_costs_no_answer(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make
) -> None:
    clean = bench().answers(request_for(prompt(100)))

    async def test() -> None:
        async with pair(decode={"link": "mapped", "secret": b"another" * 4}) as two:
            request = request_for(prompt(100))
            assert await two.answers(request) == clean
            assert two.front.served(request.id).how == "local"

    run(test())


@pytest.mark.parametrize(("mine", "theirs", "chosen"), [("auto", "auto", "loopback"), ("auto", "gloo", "gloo")])
def test_the_best_link_that_both_can_have_is_chosen(
    run: Make, pair: Make, prompt: Make, request_for: Make, mine: str, theirs: str, chosen: str
) -> None:
    async def test() -> None:
        async with pair(decode={"link": mine}, prefill={"link": theirs}) as two:
            assert (await two.see(two.d, lambda roles: roles.receiver.source("p"))).link == chosen
            request = request_for(prompt(100))
            await two.answers(request)
            assert two.front.served(request.id).how == "remote"

    run(test())


def test_a_source_that_is_read_can_give_its_blocks_away(
    run: Make, pair: Make, bench: Make, prompt: Make, request_for: Make
) -> None:
    """The generations tell: the copy is dropped and the prompt computed again."""
    clean = bench().answers(request_for(prompt(100)))

    async def test() -> None:
        async with pair(link="mapped") as two:

            async def reuse(sender: str, parcel: Any) -> None:
                del sender

                def take(roles: Any) -> None:
                    for block in parcel.source.blocks[-1:]:
                        roles.engine.pool._generations[block] += 1
                        roles.engine.arena[block] = 7.0

                await two.see(two.p, take)

            two.to_d.before["expect"] = reuse
            request = request_for(prompt(100))
            assert await two.answers(request) == clean
            assert two.front.served(request.id).how == "local"
            two.to_d.before.clear()
            await asyncio.sleep(0)

    run(test())


def held(roles: Any, request: Any) -> Any:
    """The KV of a request's full blocks, from the cache."""
    pool, names = roles.engine.pool, request.granules
    blocks = pool.acquire(names, "a test")
    assert len(blocks) == len(names)
    content = roles.engine.arena[blocks].clone()
    pool.release("a test")
    return content
