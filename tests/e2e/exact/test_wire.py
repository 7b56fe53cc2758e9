"""What a quantised wire costs in quality, on a fixed text and the real model: teacher-forced, bf16."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from cluster.front.tokenizer import TextModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from diptych.types import ModelSource
    from tests.e2e.exact.conftest import Lone, Said

pytestmark = [pytest.mark.e2e, pytest.mark.full]

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of
a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this
truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of
some one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that
Netherfield Park is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has
just been here, and she told me all about it." Mr. Bennet made no answer. "Do not you want to know who has taken it?"
cried his wife impatiently. "You want to tell me, and I have no objection to hearing it." This was invitation enough.
"Why, my dear, you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from the north
of England; that he came down on Monday in a chaise and four to see the place, and was so much delighted with it that
he agreed with Mr. Morris immediately; that he is to take possession before Michaelmas, and some of his servants are
to be in the house by the end of next week." "What is his name?" "Bingley." "Is he married or single?" "Oh, single, my
dear, to be sure! A single man of large fortune; four or five thousand a year. What a fine thing for our girls!" """
PIECE = 96
"""Tokens: each piece is handed over, and the tokens that follow it are forced."""
FOLLOW = 48


def perplexity(answers: list[Said]) -> float:
    """Of the forced tokens but the first of each answer, which comes from prefill's own KV."""
    scores = [score for answer in answers for score in answer.logprobs[1:]]
    assert all(score is not None for score in scores)
    return math.exp(-sum(score or 0.0 for score in scores) / len(scores))


def agreement(some: list[Said], others: list[Said]) -> float:
    pairs = [
        pair for one, other in zip(some, others, strict=True) for pair in zip(one.argmax, other.argmax, strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def test_an_int8_wire_costs_less_than_a_percent_of_perplexity(
    hold_apart: Callable[..., AbstractContextManager[Lone]],
    default_model: ModelSource,
    prompts: list[tuple[int, ...]],
    reference: list[Said],
) -> None:
    """Perplexity on the fixed text; choices at every position of fp32's answers to the twenty prompts."""
    tokens = tuple(TextModel.load(default_model).encode(TEXT))
    starts = range(0, len(tokens) - PIECE - FOLLOW + 1, 16)
    pieces = [tokens[start : start + PIECE] for start in starts]
    following = [tokens[start + PIECE : start + PIECE + FOLLOW] for start in starts]
    chosen = [said.tokens for said in reference]
    texts: dict[str, list[Said]] = {}
    choices: dict[str, list[Said]] = {}
    for wire in ("native", "int8", "fp8_e4m3"):
        with hold_apart(default_model, "bf16", wire) as pair:
            texts[wire] = pair.answers(pieces, FOLLOW, following)
            choices[wire] = pair.answers(prompts, len(chosen[0]), chosen)
    base = perplexity(texts["native"])
    print(f"\nnative wire: perplexity {base:.3f} over {len(pieces) * (FOLLOW - 1)} tokens")
    for wire in ("int8", "fp8_e4m3"):
        change = perplexity(texts[wire]) / base - 1
        same, of_text = agreement(choices["native"], choices[wire]), agreement(texts["native"], texts[wire])
        print(f"{wire} wire: perplexity {change:+.2%}; argmax equal {same:.2%} (at the text's positions {of_text:.2%})")
    assert abs(perplexity(texts["int8"]) / base - 1) < 0.01
    assert agreement(choices["native"], choices["int8"]) >= 0.98
