"""fp32: what the engine says is what `transformers` says, and the same bits however a request is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diptych.types import ModelSource
    from tests.e2e.conftest import Answer, Cluster, Start
    from tests.e2e.exact.conftest import Said

pytestmark = [pytest.mark.e2e, pytest.mark.full]

TOKENS = 64
FEW = 12
CLOSE = 1e-3
"""Rounding alone can turn two logits that are closer."""


def asked(prompt: Sequence[int], tokens: int = TOKENS) -> dict[str, Any]:
    return {"tokens": prompt, "max_tokens": tokens, "fingerprint": True}


@pytest.fixture(scope="module")
def answers(exact: Cluster, prompts: list[tuple[int, ...]]) -> list[Answer]:
    """From prefill and decode apart, all twenty at the same time, in chunks."""
    answers = exact.answers([asked(prompt) for prompt in prompts])
    assert {answer.served.how for answer in answers} == {"remote"}
    return answers


# ---- the same answers as transformers ---------------------------------------------------------------


class Difference(NamedTuple):
    """Where two greedy answers part, and how far apart transformers' two best logits are there."""

    position: int
    gap: float


class Transformers:
    """The same file, read and computed by transformers, fp32."""

    def __init__(self, source: ModelSource) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = Path(source.path)
        self._tensor, self._no_grad = torch.tensor, torch.no_grad
        self._model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def greedy(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Its own answer."""
        made = self._model.generate(
            self._tensor([prompt]),
            do_sample=False,
            min_new_tokens=TOKENS,
            max_new_tokens=TOKENS,
            pad_token_id=0,
        )
        return tuple(made[0, len(prompt) :].tolist())

    def first_difference(self, prompt: Sequence[int], answer: Sequence[int]) -> Difference | None:
        """From a greedy answer of its own.

        Up to there both have said the same, so one pass over prompt and answer has all its choices.
        """
        with self._no_grad():
            logits = self._model(self._tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        best = logits.topk(2)
        for position, (token, mine) in enumerate(zip(answer, best.indices[:, 0].tolist(), strict=True)):
            if token != mine:
                first, second = best.values[position].tolist()
                return Difference(position, first - second)
        return None


@pytest.fixture(scope="module")
def transformers(default_model: ModelSource) -> Transformers:
    return Transformers(default_model)


def test_greedy_answers_are_those_of_transformers(
    answers: list[Answer], prompts: list[tuple[int, ...]], transformers: Transformers
) -> None:
    differences = [
        transformers.first_difference(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found = [difference for difference in differences if difference]
    equal = sum(difference.position if difference else TOKENS for difference in differences)
    print(f"\n3a: {len(prompts) - len(found)} of {len(prompts)} answers of {TOKENS} tokens are those of transformers;")
    print(f"    {equal} tokens equal before the first differences, {len(found)}: {found}")
    assert len(prompts) == 20
    assert all(len(answer.tokens) == TOKENS for answer in answers)
    assert all(difference.gap < CLOSE for difference in found)
    # The short cut above finds what transformers' own loop says.
    shortest = min(range(len(prompts)), key=lambda place: len(prompts[place]) if not differences[place] else 10**6)
    assert transformers.greedy(prompts[shortest]) == answers[shortest].tokens


# ---- the same bits -------------------------------------------------------------------------------------


def test_a_handed_over_prompt_has_the_bits_of_one_computed_in_place(
    answers: list[Answer], reference: list[Said]
) -> None:
    """Remote against local, in chunks of 32 against whole: all twenty, every token."""
    assert [answer.tokens for answer in answers] == [said.tokens for said in reference]
    assert [answer.fingerprints for answer in answers] == [said.fingerprints for said in reference]
    print(f"\n3b: {sum(len(said.tokens) for said in reference)} logit rows bit-equal: remote, chunked = local, whole")


def test_alone_and_cached_it_has_the_bits_it_had_cold_in_a_batch(
    exact: Cluster, answers: list[Answer], prompts: list[tuple[int, ...]]
) -> None:
    longest = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))[:3]
    alone, again = ([exact.answer(**asked(prompts[place], FEW)) for place in longest] for _ in range(2))
    batched = [answers[place].fingerprints[:FEW] for place in longest]
    assert [answer.fingerprints for answer in alone] == batched
    assert [answer.fingerprints for answer in again] == batched
    assert all(answer.served.cached_tokens > 0 for answer in again)
    print(f"\n3b: {len(longest) * FEW} logit rows bit-equal: in a batch of 20 = alone = alone, cached")


def test_a_mixed_worker_of_another_cluster_beside_has_the_same_bits(
    cluster: Start, exact: Cluster, reference: list[Said], prompts: list[tuple[int, ...]]
) -> None:
    """And both clusters answer at the same time."""
    settings = ("--set", "model.dtype=fp32", "--set", "kv.memory=135MiB", "--set", "engine.threads=1")
    with cluster("--prefill", "0", "--decode", "0", "--mixed", "1", *settings) as beside:
        mixed = beside.answers([asked(prompt, FEW) for prompt in prompts])
        other = exact.answer(prompt="Two clusters,", max_tokens=4)
    assert {answer.served.how for answer in mixed} == {"mixed"}
    assert [answer.fingerprints for answer in mixed] == [said.fingerprints[:FEW] for said in reference]
    assert other.served.how == "remote"
    print(f"\n3b: {len(prompts) * FEW} logit rows bit-equal: mixed = local")
