"""An engine on the tiny model: the same bits however tokens are computed, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from diptych.errors import Internal
from diptych.types import KvLeg, KvSource
from workers.engine.sequence import Sequence

Make = Callable[..., Any]
LENGTHS = (5, 16, 17, 100, 300, 513, 33, 1)


@pytest.fixture
def requests(prompt: Make, request_for: Make) -> Callable[[], list[Any]]:
    """Greedy and sampled ones of mixed lengths; the same each time."""

    def make() -> list[Any]:
        return [
            request_for(prompt(length, seed=length), max_tokens=20, temperature=0.9 * (at % 2))
            for at, length in enumerate(LENGTHS)
        ]

    return make


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What was worked out once."""
    return {}


@pytest.fixture
def alone(bench: Make, requests: Make, known: dict[str, Any]) -> list[list[Any]]:
    """Each on an engine of its own."""
    if "alone" not in known:
        known["alone"] = [bench().answers(request)[0] for request in requests()]
    return known["alone"]


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_batch_tokens": 48}, {"max_batch_tokens": 16, "max_running": 3}],
    ids=["whole prompts", "chunks of 48", "chunks of 16"],
)
@pytest.mark.parametrize("each_steps", [0, 3], ids=["at once", "one by one"])
def test_a_batch_has_the_bits_that_each_has_alone(
    bench: Make, requests: Make, alone: Any, limits: dict[str, int], each_steps: int
) -> None:
    engine = bench(**limits)
    assert engine.answers(*requests(), each_steps=each_steps) == alone
    computed = engine.counters().prompt_tokens_computed
    assert engine.answers(*requests()) == alone  # and from the cache
    assert engine.counters().prompt_tokens_computed - computed <= 16 * len(LENGTHS)


def test_who_gave_way_has_the_bits_of_who_did_not(bench: Make, prompt: Make, request_for: Make) -> None:
    def requests() -> list[Any]:
        return [request_for(prompt(each, seed=each), max_tokens=60, temperature=0.9) for each in (17, 33, 100, 60, 5)]

    engine = bench(blocks=24)  # 17 at the beginning, 36 at the end
    assert engine.answers(*requests()) == [bench().answers(request)[0] for request in requests()]
    assert engine.counters().preemptions > 0


def test_many_more_than_fit_all_end_exactly(bench: Make, prompt: Make, request_for: Make) -> None:
    prompts = [prompt(14 + number % 13, seed=number) for number in range(64)]
    expected = bench().answers(*(request_for(each, max_tokens=36) for each in prompts))
    engine = bench(blocks=16)  # each takes four at its end
    assert engine.answers(*(request_for(each, max_tokens=36) for each in prompts)) == expected
    assert engine.counters().preemptions > 0
    assert engine.pool.held == 0


def test_more_important_newcomers_change_nobodys_tokens(bench: Make, prompt: Make, request_for: Make) -> None:
    prompts = [prompt(14 + number % 13, seed=number) for number in range(24)]
    expected = bench().answers(*(request_for(each, max_tokens=36) for each in prompts))
    engine = bench(blocks=16)
    # The later it comes, the more important it is: every newcomer takes its blocks from somebody older.
    requests = [replace(request_for(each, max_tokens=36), priority=-at) for at, each in enumerate(prompts)]
    assert engine.answers(*requests, each_steps=2) == expected
    assert engine.counters().preemptions > 0
    assert engine.pool.held == 0


def test_a_prompt_of_which_960_tokens_are_cached_computes_64(bench: Make, prompt: Make, request_for: Make) -> None:
    engine = bench()
    engine.answers(request_for(prompt(960), max_tokens=1))
    before = engine.counters()
    engine.answers(request_for(prompt(960) + prompt(64, seed=1), max_tokens=1))
    after = engine.counters()
    assert after.prompt_tokens_computed - before.prompt_tokens_computed == 64
    assert after.prompt_tokens_cached - before.prompt_tokens_cached == 960


def test_cached_tokens_count_once_for_each_request(bench: Make, prompt: Make, request_for: Make) -> None:
    engine = bench(max_batch_tokens=32)
    engine.answers(request_for(prompt(200), max_tokens=1))
    assert engine.counters().prompt_tokens_cached == 0
    for number in range(3):
        engine.answers(request_for(prompt(200) + prompt(70, seed=number + 1), max_tokens=3))
    assert engine.counters().prompt_tokens_cached == 3 * 192
    # One that goes on after its first token finds all of its prompt.
    went_on = engine.sequence(request_for(prompt(192), max_tokens=3))
    went_on.accept(7)
    engine.add(went_on)
    engine.step()
    assert engine.counters().prompt_tokens_cached == 4 * 192
    engine.drop(went_on)


@pytest.mark.parametrize("stage", ["prompt", "answer"])
def test_logits_that_are_not_finite_fail_their_own_request_only(
    bench: Make, prompt: Make, request_for: Make, stage: str
) -> None:
    clean = bench().answers(request_for(prompt(300, seed=1), max_tokens=12))[0]
    engine = bench(max_batch_tokens=400)
    victim = engine.sequence(request_for(prompt(100), max_tokens=50))
    other = engine.sequence(request_for(prompt(300, seed=1), max_tokens=12))
    engine.add(victim)
    if stage == "answer":
        engine.step()
    engine.add(other)
    engine.plan()
    assert 0 in victim.blocks  # the one that other engines would pad with
    engine.arena[victim.blocks[0], 0, 1, 0, 0] = float("inf")
    said: list[Any] = []
    failed: list[Any] = []
    while engine.has_work:
        if stage == "prompt" and victim.blocks:
            engine.arena[victim.blocks[-1], 1, 1, 0, 3] = float("nan")
        result = engine.step()
        failed += result.failed
        for sampled in result.sampled:
            if sampled.sequence is other:
                said.append((sampled.token, sampled.fingerprint))
            if sampled.finish:
                engine.drop(sampled.sequence)
        engine.pool.check()
        if failed:
            victim.blocks = []
    assert [(sequence, type(error)) for sequence, error in failed] == [(victim, Internal)]
    assert victim.request.id in str(failed[0][1])
    assert said == [tuple(token) for token in clean]
    assert engine.pool.held == 0
    assert torch.isfinite(engine.arena).all()


def test_an_overflow_that_nobody_saw_harms_nobody(bench: Make, prompt: Make, request_for: Make) -> None:
    clean = bench().answers(request_for(prompt(5, seed=1)), request_for(prompt(300, seed=2)))
    engine = bench(blocks=30, max_batch_tokens=64)
    cancelled = engine.sequence(request_for(prompt(400), max_tokens=50))
    engine.add(cancelled)
    engine.step()
    engine.arena[cancelled.blocks] = float("nan")
    engine.drop(cancelled)  # in the middle of its prompt: it had no logits to look at
    assert engine.answers(request_for(prompt(5, seed=1)), request_for(prompt(300, seed=2))) == clean


def test_an_engine_dropped_anywhere_is_whole(bench: Make, prompt: Make, request_for: Make) -> None:
    chance = random.Random(5)
    engine = bench(blocks=20, max_batch_tokens=48, max_running=6)
    alive: list[Sequence] = []
    for number in range(300):
        if chance.random() < 0.4:
            length = chance.choice([1, 15, 16, 17, 40, 100])
            alive.append(engine.sequence(request_for(prompt(length, seed=number % 7), max_tokens=100)))
            engine.add(alive[-1])
        result = engine.step()
        for sampled in result.sampled:
            if sampled.finish:
                engine.drop(sampled.sequence)
                alive.remove(sampled.sequence)
        if alive and chance.random() < 0.15:
            engine.drop(alive.pop(chance.randrange(len(alive))))
        engine.pool.check()
        owners = set(engine.pool.owners())
        assert owners <= {name for sequence in alive for name in (sequence.owner, sequence.ticket)}
    for sequence in alive:
        engine.drop(sequence)
    engine.pool.check()
    assert (engine.pool.held, engine.pool.granted, engine.pool.lent) == (0, 0, 0)
    assert not engine.has_work
    assert engine.counters().preemptions > 0


def test_forced_tokens_are_emitted_with_what_the_logits_would_have_chosen(
    bench: Make, prompt: Make, request_for: Make
) -> None:
    engine = bench()
    chosen = [token for token, _ in engine.answers(request_for(prompt(40), max_tokens=6))[0]]
    forced = (*chosen[:3], 9)
    sequence = engine.sequence(request_for(prompt(40), max_tokens=6, forced=forced, stop_token_ids=(9,)))
    engine.add(sequence)
    said: list[Any] = []
    while not said or not said[-1].finish:
        said += engine.step().sampled
    engine.drop(sequence)
    assert tuple(each.token for each in said[:4]) == forced
    assert [each.argmax for each in said[:4]] == chosen[:4]
    assert [each.finish for each in said] == [None] * 5 + ["length"]


def test_a_hand_off_between_two_engines_has_the_bits_of_one(bench: Make, prompt: Make, request_for: Make) -> None:
    request = request_for(prompt(100), max_tokens=10, temperature=0.7)
    expected = bench().answers(request)[0]
    prefill, decode = bench(), bench()
    source = prefill.sequence(request)
    prefill.add(source)
    (first,) = prefill.step().sampled
    target = decode.sequence(request)
    target.task = "decode"
    decode.add(target)
    (granted,) = decode.step().plan.granted
    assert granted is target
    blocks, leg = tuple(source.blocks[:7]), KvLeg(source=0, target=0, first_head=0, heads=prefill.layout.kv_heads)
    sent = KvSource(blocks=blocks, generations=(1,) * 7, skip=0, first_head=0, heads=leg.heads, wire="fp32")
    decode.unpack(target.blocks, 0, 7, leg, "fp32", prefill.pack(sent, 7))
    decode.join(target, first.token)
    said = [(first.token, first.fingerprint)]
    while len(said) < 10:
        said += [(each.token, each.fingerprint) for each in decode.step().sampled]
    assert said == [tuple(token) for token in expected]
    decode.drop(target)
    assert decode.counters().prompt_tokens_computed == 0
    assert (decode.pool.held, decode.pool.cached) == (0, 6)
