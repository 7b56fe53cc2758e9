"""bf16, teacher-forced: its choices are nearly always those of fp32, and those of a hand-off those made in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diptych.types import ModelSource
    from tests.e2e.conftest import Cluster
    from tests.e2e.exact.conftest import Hold, Lone, Said

pytestmark = [pytest.mark.e2e, pytest.mark.full]

TOKENS = 64
Choices = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def forced(reference: list[Said]) -> Choices:
    """fp32's greedy answers: at every position what fp32 chose after the same tokens."""
    return [said.tokens for said in reference]


@pytest.fixture(scope="module")
def remote(served: Cluster, prompts: list[tuple[int, ...]], forced: Choices) -> Choices:
    asks = [{"tokens": prompt, "forced": tokens} for prompt, tokens in zip(prompts, forced, strict=True)]
    answers = served.answers(asks)
    assert {answer.served.how for answer in answers} == {"remote"}
    assert [answer.tokens for answer in answers] == forced
    return [answer.argmax for answer in answers]


@pytest.fixture(scope="module")
def bf16(hold: Hold, default_model: ModelSource) -> Iterator[Lone]:
    with hold(default_model, "bf16") as lone:
        yield lone


def equal_share(some: Sequence[Sequence[int | None]], others: Sequence[Sequence[int | None]]) -> float:
    pairs = [pair for one, other in zip(some, others, strict=True) for pair in zip(one, other, strict=True)]
    assert len(pairs) == 20 * TOKENS
    return sum(one == other for one, other in pairs) / len(pairs)


def test_its_argmax_is_that_of_fp32(remote: Choices, forced: Choices) -> None:
    share = equal_share(remote, forced)
    print(f"\n3c: bf16 chooses what fp32 chooses in {share:.2%} of {20 * TOKENS} positions")
    assert share >= 0.97


def test_a_handed_over_prompt_is_answered_as_one_computed_in_place(
    remote: Choices, bf16: Lone, prompts: list[tuple[int, ...]], forced: Choices
) -> None:
    local = [said.argmax for said in bf16.answers(prompts, TOKENS, forced)]
    share = equal_share(remote, local)
    print(f"\n3d: bf16 chooses the same remote and local in {share:.2%} of {20 * TOKENS} positions")
    assert share >= 0.995
