"""What is done to logits before a token is drawn, and what they say of tokens. Knows no request.

Edits touch single places of [rows, vocabulary] logits, in place: a batch with a few penalties
costs those few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference.sampling import highest


class Places(NamedTuple):
    """Single logits: [places] int64 each. None twice, unless to be banned."""

    rows: Tensor
    tokens: Tensor


class Penalties(NamedTuple):
    """Of tokens seen before, by place; factors and terms [places] fp32."""

    places: Places
    counts: Tensor
    """How often the answer has the token; 0 for one of the prompt alone."""
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


class Scores(NamedTuple):
    """What the logits gave some tokens and the best alternatives."""

    logprobs: Tensor
    """[rows] of the tokens."""
    ranks: Tensor
    """[rows] 1 is the most probable."""
    top_tokens: Tensor
    """[rows, count] by falling probability, and `top_logprobs`."""
    top_logprobs: Tensor


def penalise_(logits: Tensor, penalties: Penalties) -> None:
    """Repetition as in CTRL (Keskar et al. 2019), presence and frequency as OpenAI defines them."""
    places, counts = penalties.places, penalties.counts
    values = logits[places]
    values = torch.where(values < 0, values * penalties.repetition, values / penalties.repetition)
    logits[places] = values - penalties.frequency * counts - penalties.presence * (counts > 0)


def bias_(logits: Tensor, places: Places, bias: Tensor) -> None:
    """bias: [places] is added."""
    logits[places] += bias


def ban_(logits: Tensor, places: Places) -> None:
    """These can't be drawn."""
    logits[places] = -torch.inf


def allow_(logits: Tensor, places: Places) -> None:
    """In every row that is named, nothing but these can be drawn."""
    kept = logits[places]
    named = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    named[places.rows] = True
    logits[named] = -torch.inf
    logits[places] = kept


def score(logits: Tensor, tokens: Tensor, count: int) -> Scores:
    """logits: [rows, vocabulary] fp32, tokens: [rows]; `count` ≤ vocabulary alternatives."""
    logprobs, at = logits.log_softmax(-1), tokens[:, None]
    ranks = 1 + (logits > logits.gather(-1, at)).sum(-1)
    top = highest(logits, count)
    return Scores(logprobs.gather(-1, at)[:, 0], ranks, top, logprobs.gather(-1, top))
