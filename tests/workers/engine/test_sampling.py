"""Sampling parameters in an engine: what each does, and that nothing else in the batch changes it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diptych.errors import InvalidRequest
from diptych.types import Request, RequestId, SamplingParams
from workers.engine.batch import looked_at
from workers.engine.logit_rules import LogitRules, apply_rules
from workers.engine.sampling import Sampler
from workers.engine.sequence import Sequence
from workers.engine.token_counts import TokenCounts

Make = Callable[..., Any]
VOCABULARY = 64


@pytest.fixture
def sequence(request_for: Make) -> Callable[..., Sequence]:
    """(prompt, answer so far, **sampling) → a sequence that is about to get its next token."""

    def make(prompt: tuple[int, ...] = (1, 2, 3), answer: tuple[int, ...] = (), **params: Any) -> Sequence:
        made = sequence_of(request_for(prompt, 100, **params))
        made.tokens += answer
        return made

    return make


def sequence_of(request: Request) -> Sequence:
    return Sequence(request=request, attempt=0, task="answer", arrival=0, block_size=16)


def some_logits(rows: int = 1, scale: float = 2.0) -> torch.Tensor:
    return torch.randn((rows, VOCABULARY), generator=torch.Generator().manual_seed(3)) * scale


def ruled(sequence: Sequence, logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    apply_rules(logits, [LogitRules(sequence)])
    return logits


# ---- what each parameter does ---------------------------------------------------------------------------


def test_repetition_is_over_prompt_and_answer_as_in_transformers(sequence: Make) -> None:
    logits, prompt, answer = some_logits(), (5, 6, 6), (7, 5)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, *answer]]), logits.clone())
    assert torch.equal(ruled(sequence(prompt, answer, repetition_penalty=1.7), logits), wanted)


def test_presence_and_frequency_are_over_the_answer_alone(sequence: Make) -> None:
    logits = some_logits()
    wanted = logits.clone()
    wanted[0, 7] -= 0.5 + 2 * 0.3
    wanted[0, 5] -= 0.5 + 1 * 0.3
    penalised = sequence((5, 6), (7, 5, 7), presence_penalty=0.5, frequency_penalty=0.3)
    torch.testing.assert_close(ruled(penalised, logits), wanted)


def test_penalties_come_before_the_bias_and_bans_come_last(sequence: Make) -> None:
    logits = some_logits()
    changed = ruled(
        sequence((5,), (9,), repetition_penalty=2.0, logit_bias=((5, 4.0), (9, 100.0)), bad_words=((9,),)), logits
    )
    raw = float(logits[0, 5])
    assert float(changed[0, 5]) == pytest.approx((raw * 2 if raw < 0 else raw / 2) + 4)
    assert changed[0, 9] == -torch.inf


@pytest.mark.parametrize("answer", [(), (8,), (8, 9), (2, 8, 9), (8, 9, 8)], ids=str)
def test_bad_words_are_transformers_the_prompt_counting_as_their_beginning(
    sequence: Make, answer: tuple[int, ...]
) -> None:
    logits, words, prompt = some_logits(), ((4,), (8, 9), (8, 9, 10), (2, 8), (3, 8)), (1, 8, 3)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words])
    wanted = processor(torch.tensor([[*prompt, *answer]]), logits.clone())
    assert torch.equal(ruled(sequence(prompt, answer, bad_words=words), logits), wanted)


def test_stop_tokens_are_banned_while_the_answer_is_too_short(sequence: Make) -> None:
    params = {"min_tokens": 2, "stop_token_ids": (7, 8)}
    for length, banned in ((0, True), (1, True), (2, False)):
        changed = ruled(sequence((1,), (5,) * length, **params), some_logits())
        assert (changed[0] == -torch.inf).nonzero().flatten().tolist() == ([7, 8] if banned else [])


def test_only_allowed_tokens_are_left(sequence: Make) -> None:
    changed = ruled(sequence(allowed_token_ids=(3, 60)), some_logits())
    assert (changed[0] > -torch.inf).nonzero().flatten().tolist() == [3, 60]


def test_neutral_parameters_leave_the_logits_alone(request_for: Make) -> None:
    assert not LogitRules.needed(SamplingParams(max_tokens=1))
    assert not LogitRules.needed(SamplingParams(max_tokens=1, stop_token_ids=(3,), temperature=0.2, top_k=3))


def test_greedy_answers_follow_the_changed_logits(bench: Make, request_for: Make, prompt: Make) -> None:
    engine = bench()
    [plain] = engine.answers(request_for(prompt(20)))
    [other] = engine.answers(request_for(prompt(20), logit_bias=((plain[0].token, -100.0),)))
    [forced] = engine.answers(request_for(prompt(20), logit_bias=((77, 100.0),)))
    [frequent] = engine.answers(request_for(prompt(20), 12, logit_bias=((77, 100.0),), frequency_penalty=2.0))
    assert other[0].token != plain[0].token
    assert other[0].fingerprint == plain[0].fingerprint  # of the raw logits
    assert {token for token, _ in forced} == {77}
    assert {token for token, _ in frequent} == {77}  # 24 taken off 100


def test_min_tokens_holds_the_stop_token_back(bench: Make, request_for: Make, prompt: Make) -> None:
    params = {"logit_bias": ((7, 100.0),), "stop_token_ids": (7,)}
    [short] = bench().answers(request_for(prompt(5), 20, **params))
    [long] = bench().answers(request_for(prompt(5), 20, min_tokens=6, **params))
    assert [token for token, _ in short] == [7]
    assert [token for token, _ in long].index(7) == len(long) - 1 == 6


def test_a_request_that_bans_everything_fails_alone(bench: Make, request_for: Make, prompt: Make) -> None:
    engine = bench()
    stuck = engine.sequence(request_for(prompt(5), 20, allowed_token_ids=(9,), bad_words=((9, 9),)))
    fine = engine.sequence(request_for(prompt(5), 3))
    engine.add(stuck)
    engine.add(fine)
    first = engine.step()
    assert [sampled.token for sampled in first.sampled if sampled.sequence is stuck] == [9]
    second = engine.step()
    [(failed, error)] = second.failed
    assert failed is stuck
    assert isinstance(error, InvalidRequest)
    assert "allow more tokens" in str(error)
    assert [sampled.sequence for sampled in second.sampled] == [fine]


# ---- counting ------------------------------------------------------------------------------------------------


def test_counts_grow_token_by_token_to_what_a_fresh_count_gives() -> None:
    dice = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 500, (300,), generator=dice).tolist()
    answer = torch.randint(0, 500, (400,), generator=dice).tolist()
    grown = TokenCounts(prompt)
    for length in range(0, 401, 7):
        grown.follow([*prompt, *answer[:length]], len(prompt))
    grown.follow([*prompt, *answer], len(prompt))
    fresh = TokenCounts(prompt)
    fresh.follow([*prompt, *answer], len(prompt))
    wanted = dict.fromkeys(prompt, 0.0) | {token: float(count) for token, count in Counter(answer).items()}
    for counts in (grown, fresh):
        assert dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True)) == wanted


# ---- distributions ---------------------------------------------------------------------------------------------


def assert_distributed(chosen: list[int], probabilities: torch.Tensor) -> None:
    """Pearson's chi-square, below what a right distribution exceeds once in a thousand. The seeds are fixed."""
    expected = probabilities.double() * len(chosen)
    counted = torch.bincount(torch.tensor(chosen), minlength=len(expected)).double()
    common = expected >= 5
    cells = [*zip(counted[common].tolist(), expected[common].tolist(), strict=True)]
    cells.append((float(counted[~common].sum()), float(expected[~common].sum()) + 1e-9))
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert sum((seen - mean) ** 2 / mean for seen, mean in cells) < bound, cells


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 10},
        {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.7, "min_p": 0.05},
        {"temperature": 1.4, "logit_bias": ((3, 2.0), (5, -3.0)), "bad_words": ((6,),), "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_of_many_seeds_follow_the_probabilities(sequence: Make, params: dict[str, Any]) -> None:
    draws, logits = 3000, some_logits()
    ready = [sequence((5, 9), (5,), **{**params, "seed": seed}) for seed in range(draws)]
    chosen = Sampler(torch.device("cpu")).choose(ready, looked_at(logits.expand(draws, -1))).sampled
    warpers = [TemperatureLogitsWarper(params["temperature"])]
    warpers += [TopKLogitsWarper(params["top_k"])] if "top_k" in params else []
    warpers += [TopPLogitsWarper(params["top_p"])] if "top_p" in params else []
    warpers += [MinPLogitsWarper(params["min_p"])] if "min_p" in params else []
    changed = ruled(sequence((5, 9), (5,), **params), logits)
    for warper in warpers:
        changed = warper(torch.zeros((1, 1)), changed)
    assert_distributed([each.token for each in chosen], changed[0].softmax(-1))


def test_draws_of_many_choices_and_positions_follow_the_probabilities(request_for: Make) -> None:
    draws, logits = 2000, some_logits()
    request = request_for((1, 2), 9999, temperature=1.0)
    of_choices = [sequence_of(replace(request, choice=at)) for at in range(draws)]
    of_positions = [sequence_of(request) for _ in range(draws)]
    for at, each in enumerate(of_positions):
        each.tokens += [0] * at
    for ready in (of_choices, of_positions):
        chosen = Sampler(torch.device("cpu")).choose(ready, looked_at(logits.expand(draws, -1))).sampled
        assert_distributed([each.token for each in chosen], logits[0].softmax(-1))


# ---- alone and together ----------------------------------------------------------------------------------------


def assorted() -> list[dict[str, Any]]:
    """32 different parameter sets, every parameter in some of them."""
    dice = random.Random(4)
    sets: list[dict[str, Any]] = []
    for number in range(32):
        params: dict[str, Any] = {"seed": number, "temperature": dice.choice((0.0, 0.5, 1.0, 1.6))}
        options = {
            "top_k": dice.choice((1, 5, 40, 280)),
            "top_p": dice.choice((0.5, 0.9, 0.99)),
            "min_p": dice.choice((0.01, 0.2)),
            "repetition_penalty": dice.choice((0.8, 1.2, 2.0)),
            "presence_penalty": dice.uniform(-2, 2),
            "frequency_penalty": dice.uniform(-2, 2),
            "logit_bias": tuple((token, dice.uniform(-5, 5)) for token in dice.sample(range(300), 20)),
            "bad_words": tuple(tuple(dice.sample(range(300), length)) for length in (1, 1, 2, 3)),
            "allowed_token_ids": tuple(dice.sample(range(300), 60)),
            "stop_token_ids": tuple(dice.sample(range(300), 3)),
            "min_tokens": 8,
            "logprobs": dice.choice((0, 1, 20)),
            "prompt_logprobs": dice.choice((0, 5)),
        }
        sets.append(params | {name: options[name] for name in dice.sample(sorted(options), dice.randint(0, 6))})
    assert {name for each in sets for name in each} >= options.keys()
    return sets


def everything_of(engine: Any, requests: list[Request], *, each_steps: int = 0) -> list[list[Any]]:
    """What each request got: tokens, fingerprints, log-probabilities."""
    arriving = [engine.sequence(request) for request in requests]
    said: dict[Sequence, list[Any]] = {sequence: [] for sequence in arriving}
    for step in itertools.count():
        if arriving and (not each_steps or step % each_steps == 0):
            engine.add(arriving.pop(0))
            if not each_steps:
                continue
        if not arriving and not engine.has_work:
            return list(said.values())
        result = engine.step()
        assert not result.failed
        for sampled in result.sampled:
            said[sampled.sequence].append(sampled[1:])
            if sampled.finish:
                engine.drop(sampled.sequence)
    raise AssertionError


def test_32_parameter_sets_in_a_batch_get_what_each_gets_alone(bench: Make, request_for: Make, prompt: Make) -> None:
    def requests() -> list[Request]:
        return [request_for(prompt(5 + 3 * at, seed=at), 24, **params) for at, params in enumerate(assorted())]

    alone = [everything_of(bench(), [request])[0] for request in requests()]
    assert len({tuple(token for _, token, *_ in answer) for answer in alone}) > 28
    together = bench()
    assert everything_of(together, requests()) == alone
    assert everything_of(bench(max_batch_tokens=48), requests(), each_steps=2) == alone
    crowded = bench(blocks=14)
    assert everything_of(crowded, requests()) == alone
    assert crowded.counters().preemptions


def test_choices_differ_and_come_again_with_the_seed(bench: Make, request_for: Make, prompt: Make) -> None:
    def answers(seed: int) -> list[Any]:
        request = request_for(prompt(10), 16, temperature=1.0, seed=seed)
        requests = [replace(request, id=RequestId(f"{request.id}-{at}"), choice=at) for at in range(4)]
        return bench().answers(*requests)

    assert len({tuple(answer) for answer in answers(1)}) == 4
    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_a_prompt_is_scored_whole_though_it_is_cached_and_the_score_is_the_same(
    bench: Make, request_for: Make, prompt: Make
) -> None:
    engine, tokens = bench(), prompt(600)
    [first] = everything_of(engine, [request_for(tokens, 4, prompt_logprobs=3)])
    computed = engine.counters().prompt_tokens_computed
    [again] = everything_of(engine, [request_for(tokens, 4, prompt_logprobs=3)])
    assert engine.counters().prompt_tokens_computed - computed == 600
    [chunked] = everything_of(bench(max_batch_tokens=32), [request_for(tokens, 4, prompt_logprobs=3)])
    assert first == again == chunked
    [unscored] = everything_of(engine, [request_for(tokens, 4)])
    assert engine.counters().prompt_tokens_computed - computed < 620  # what it wrote to the cache is used
    assert [each[1] for each in unscored] == [each[1] for each in first]
    scores = [each[-1] for each in first]
    assert len(scores[0]) == 599
    assert scores[1:] == [None] * 3
