"""Edits of logits against `transformers`, and log-probabilities against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

import kernels


def some_logits(rows: int = 3) -> Tensor:
    return torch.randn((rows, 50), generator=torch.Generator().manual_seed(0)) * 3


def places(*pairs: tuple[int, int]) -> kernels.Places:
    rows, tokens = zip(*pairs, strict=True)
    return kernels.Places(torch.tensor(rows), torch.tensor(tokens))


def penalties(at: kernels.Places, counts: list[float], **terms: float) -> kernels.Penalties:
    values = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, **terms}
    columns = {name: torch.full((len(counts),), value) for name, value in values.items()}
    return kernels.Penalties(places=at, counts=torch.tensor(counts), **columns)


def test_repetition_is_transformers_and_touches_no_other_row() -> None:
    for penalty in (0.5, 1.3, 4.0):
        logits = some_logits()
        seen = torch.tensor([[3, 7, 9, 7]])
        wanted = logits.clone()
        wanted[1:2] = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[1:2].clone())
        kernels.penalise_(logits, penalties(places((1, 3), (1, 7), (1, 9)), [0, 2, 1], repetition=penalty))
        assert torch.equal(logits, wanted)


def test_presence_is_taken_once_and_frequency_for_each_time() -> None:
    logits = some_logits()
    wanted = logits.clone()
    wanted[0, 4] -= 0.5 + 3 * 0.25
    wanted[2, 6] -= 0.5 + 1 * 0.25
    at = places((0, 4), (2, 6), (2, 8))
    kernels.penalise_(logits, penalties(at, [3, 1, 0], presence=0.5, frequency=0.25))
    torch.testing.assert_close(logits, wanted)


def test_a_bias_is_transformers() -> None:
    logits = some_logits()
    processor = SequenceBiasLogitsProcessor([[[5], 2.5], [[9], -100.0]])
    wanted = logits.clone()
    wanted[1:2] = processor(torch.zeros((1, 4), dtype=torch.int64), logits[1:2].clone())
    kernels.bias_(logits, places((1, 5), (1, 9)), torch.tensor([2.5, -100.0]))
    assert torch.equal(logits, wanted)


def test_what_is_banned_or_not_allowed_has_no_probability_and_the_rest_keeps_its_logit() -> None:
    logits = some_logits()
    wanted = logits.clone()
    wanted[0, [1, 2]] = -torch.inf
    wanted[2] = -torch.inf
    wanted[2, [7, 8]] = logits[2, [7, 8]]
    kernels.allow_(logits, places((2, 7), (2, 8)))
    kernels.ban_(logits, places((0, 1), (0, 2)))
    assert torch.equal(logits, wanted)


def test_scores_are_log_softmax_with_ranks_and_the_best_alternatives() -> None:
    logits = some_logits(20)
    tokens = torch.arange(20)
    scores = kernels.score(logits, tokens, 5)
    logprobs = logits.double().log_softmax(-1)
    torch.testing.assert_close(scores.logprobs, logprobs[torch.arange(20), tokens].float())
    order = logprobs.argsort(-1, descending=True)
    assert torch.equal(scores.ranks - 1, (order == tokens[:, None]).int().argmax(-1))
    assert torch.equal(scores.top_tokens, order[:, :5])
    torch.testing.assert_close(scores.top_logprobs, logprobs.gather(-1, order[:, :5]).float())
    assert kernels.score(logits, tokens, 0).top_tokens.shape == (20, 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_scores_are_its_own(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    logits = torch.randn((33, 20_011), generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(33)
    together = kernels.score(logits, tokens, 3)
    for row in range(0, 33, 4):
        alone = kernels.score(logits[row : row + 1].clone(), tokens[row : row + 1], 3)
        assert all(torch.equal(one, many[row : row + 1]) for one, many in zip(alone, together, strict=True))
    torch.set_num_threads(before)
