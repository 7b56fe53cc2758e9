"""What the parameters of a batch's sequences change in their logits. Knows no drawing.

The order is penalties, bias, then what can't be drawn at all, as in `transformers`. Everything
follows from a sequence's parameters and its tokens so far, so it is the same after a preemption and
on another worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

import kernels
from diptych.types import SamplingParams
from workers.engine.sequence import Sequence
from workers.engine.token_counts import TokenCounts


class LogitRules:
    """Of one sequence, prepared once."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self.params = params = sequence.request.params
        seen = sequence.tokens[: sequence.answer_start] if params.repetition_penalty != 1 else ()
        self._counts = TokenCounts(seen) if _penalises(params) else None
        self.bias_tokens = _ids(token for token, _ in params.logit_bias)
        self.bias = torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float32)
        self.allowed = _ids(params.allowed_token_ids)
        single = {word[0] for word in params.bad_words if len(word) == 1}
        self._banned = _ids(sorted(single))
        self._banned_early = _ids(sorted(single.union(params.stop_token_ids)))
        self._phrases = [word for word in params.bad_words if len(word) > 1]

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether the parameters change any logit."""
        changes = (params.logit_bias, params.allowed_token_ids, params.bad_words, params.min_tokens)
        return _penalises(params) or any(changes)

    def counts(self) -> TokenCounts | None:
        """Up to date; None without penalties."""
        if self._counts is not None:
            self._counts.follow(self._sequence.tokens, self._sequence.answer_start)
        return self._counts

    def banned(self) -> Tensor:
        """What the next token can't be."""
        early = self._sequence.generated < self.params.min_tokens
        always = self._banned_early if early else self._banned
        ends = {word[-1] for word in self._phrases if self._is_begun(word)}
        return torch.cat((always, _ids(ends))) if ends else always

    def _is_begun(self, word: tuple[int, ...]) -> bool:
        before = len(word) - 1
        return tuple(self._sequence.tokens[-before:]) == word[:-1]


def apply_rules(logits: Tensor, rules: SequenceOf[LogitRules | None]) -> None:
    """In place; `rules[row]` is about logits[row]."""
    placed = [(row, each) for row, each in enumerate(rules) if each is not None]
    penalised = [(row, each.params, counts) for row, each in placed if (counts := each.counts())]
    if penalised:
        kernels.penalise_(logits, _penalties(penalised, logits.device))
    if biased := [(row, each) for row, each in placed if len(each.bias)]:
        places = _places([(row, each.bias_tokens) for row, each in biased], logits.device)
        kernels.bias_(logits, places, torch.cat([each.bias for _, each in biased]).to(logits.device))
    if limited := [(row, each.allowed) for row, each in placed if len(each.allowed)]:
        kernels.allow_(logits, _places(limited, logits.device))
    if banned := [(row, tokens) for row, each in placed if len(tokens := each.banned())]:
        kernels.ban_(logits, _places(banned, logits.device))


def _penalties(
    penalised: SequenceOf[tuple[int, SamplingParams, TokenCounts]], device: torch.device
) -> kernels.Penalties:
    lengths = torch.tensor([len(counts.tokens) for _, _, counts in penalised])

    def per_place(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths).to(device)

    return kernels.Penalties(
        places=_places([(row, counts.tokens) for row, _, counts in penalised], device),
        counts=torch.cat([counts.counts for _, _, counts in penalised]).to(device),
        repetition=per_place([params.repetition_penalty for _, params, _ in penalised]),
        presence=per_place([params.presence_penalty for _, params, _ in penalised]),
        frequency=per_place([params.frequency_penalty for _, params, _ in penalised]),
    )


def _places(tokens_of_rows: SequenceOf[tuple[int, Tensor]], device: torch.device) -> kernels.Places:
    rows = torch.tensor([row for row, _ in tokens_of_rows])
    lengths = torch.tensor([len(tokens) for _, tokens in tokens_of_rows])
    tokens = torch.cat([tokens for _, tokens in tokens_of_rows])
    return kernels.Places(rows.repeat_interleave(lengths).to(device), tokens.to(device))


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _ids(tokens: Iterable[int]) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)
