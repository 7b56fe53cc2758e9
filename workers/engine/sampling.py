"""From sequences and their logits to their next tokens. Knows no model, cache or role."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

import kernels
from diptych.errors import Internal, InvalidRequest, ServingError
from diptych.types import Emission, Finish, SamplingParams, Served, TokenLogprobs
from workers.engine.logit_rules import LogitRules, apply_rules
from workers.engine.noise import uniform
from workers.engine.sequence import Sequence

_SCORED_ROWS: Final = 64
"""Scored at a time: a long prompt's scores need several times the room of its logits."""


class Sampled(NamedTuple):
    """A sequence's next token."""

    sequence: Sequence
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    token: int
    finish: Finish | None
    fingerprint: bytes | None
    argmax: int | None
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None

    def emission(self, served: Served | None) -> Emission:
        """As it goes to the front."""
        request = self.sequence.request
        return Emission(
            request=request.id,
            attempt=self.sequence.attempt,
            choice=request.choice,
            index=self.index,
            token=self.token,
            finish=self.finish,
            served=served,
            fingerprint=self.fingerprint,
            argmax=self.argmax,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


class Chosen(NamedTuple):
    """What became of the sequences of one step."""

    sampled: tuple[Sampled, ...] = ()
    failed: tuple[tuple[Sequence, ServingError], ...] = ()


class Sampler:
    """Keeps what is prepared once per sequence; nothing in it can't be made again from the tokens."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rules: dict[Sequence, LogitRules] = {}

    def forget(self, sequence: Sequence) -> None:
        """It is over here."""
        self._rules.pop(sequence, None)

    def choose(self, ready: SequenceOf[Sequence], said: kernels.Logits) -> Chosen:
        """Every sequence that doesn't fail gets its token."""
        if not ready:
            return Chosen()
        logits = said.values
        greedy: list[int] = said.highest.tolist()
        errors = _not_finite(ready, said.finite.tolist())
        tokens = self._draw(ready, logits, greedy, errors)
        for row, sequence in enumerate(ready):
            forced = sequence.request.params.forced
            if sequence.generated < len(forced):
                tokens[row] = forced[sequence.generated]
        scores = _scores([each.request.params.logprobs for each in ready], tokens, logits)
        sampled = [
            _accept(sequence, tokens[row], greedy[row], logits[row], scores[row])
            for row, sequence in enumerate(ready)
            if sequence not in errors
        ]
        return Chosen(tuple(sampled), tuple(errors.items()))

    def _draw(
        self, ready: SequenceOf[Sequence], logits: Tensor, greedy: list[int], errors: dict[Sequence, ServingError]
    ) -> list[int]:
        params = [sequence.request.params for sequence in ready]
        rules = [self._rules_of(sequence) for sequence in ready]
        if any(rules):
            logits = logits.clone()  # fingerprints and log-probabilities are of the raw ones
            apply_rules(logits, rules)
            for row in _numbers((logits.amax(-1) == -torch.inf).nonzero().flatten()):
                message = f"{ready[row].request.id}: nothing is left to draw at token {ready[row].generated}: "
                errors.setdefault(ready[row], InvalidRequest(message + "allow more tokens or ban fewer"))
        if all(each.temperature == 0 for each in params):
            return _numbers(logits.argmax(-1)) if any(rules) else list(greedy)
        return _numbers(kernels.sample_tokens(logits, self._sampling(ready, params)))

    def _sampling(self, ready: SequenceOf[Sequence], params: SequenceOf[SamplingParams]) -> kernels.Sampling:
        noise = [
            uniform(each.seed, sequence.request.choice, len(sequence.tokens))
            for each, sequence in zip(params, ready, strict=True)
        ]
        columns = (
            [each.temperature for each in params],
            [each.top_p for each in params],
            [each.min_p for each in params],
            noise,
        )
        temperature, top_p, min_p, uniforms = torch.tensor(columns, dtype=torch.float64).to(self._device)
        top_k = torch.tensor([each.top_k for each in params]).to(self._device)
        return kernels.Sampling(temperature, top_k, top_p, min_p, uniforms)

    def _rules_of(self, sequence: Sequence) -> LogitRules | None:
        rules = self._rules.get(sequence)
        if rules is None and LogitRules.needed(sequence.request.params):
            rules = self._rules[sequence] = LogitRules(sequence)
        return rules


def score_prompt(sequence: Sequence, start: int, logits: Tensor) -> None:
    """logits[i] is of the prompt's token `start + i`; what it says of the next is noted with the sequence."""
    count = sequence.request.params.prompt_logprobs
    assert count is not None, "nobody asked for them"
    tokens = sequence.tokens[start + 1 : start + 1 + len(logits)]
    for first in range(0, len(logits), _SCORED_ROWS):
        rows = slice(first, first + _SCORED_ROWS)
        sequence.prompt_scores += _score(logits[rows], tokens[rows], [count] * len(tokens[rows]))


def _accept(sequence: Sequence, token: int, greedy: int, logits: Tensor, logprobs: TokenLogprobs | None) -> Sampled:
    params, index = sequence.request.params, sequence.generated
    wanted = index == 0 and params.prompt_logprobs is not None
    prompt_logprobs = tuple(sequence.prompt_scores) if wanted else None
    assert not wanted or len(sequence.prompt_scores) == sequence.prompt_length - 1, "a prompt token has no score"
    sequence.prompt_scores = []
    return Sampled(
        sequence=sequence,
        index=index,
        token=token,
        finish=sequence.accept(token),
        fingerprint=_fingerprint(logits) if params.fingerprint else None,
        argmax=greedy if params.forced else None,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _not_finite(ready: SequenceOf[Sequence], finite: list[bool]) -> dict[Sequence, ServingError]:
    wrong = [sequence for sequence, is_finite in zip(ready, finite, strict=True) if not is_finite]
    return {each: Internal(f"{each.request.id}: the model's logits are not finite") for each in wrong}


def _scores(counts: SequenceOf[int | None], tokens: SequenceOf[int], logits: Tensor) -> list[TokenLogprobs | None]:
    rows = [row for row, count in enumerate(counts) if count is not None]
    scores: list[TokenLogprobs | None] = [None] * len(counts)
    if rows:
        wanted = [count for count in counts if count is not None]
        for row, score in zip(rows, _score(logits[rows], [tokens[row] for row in rows], wanted), strict=True):
            scores[row] = score
    return scores


def _score(logits: Tensor, tokens: SequenceOf[int], counts: SequenceOf[int]) -> list[TokenLogprobs]:
    at = torch.tensor(tokens, device=logits.device)
    scores = kernels.score(logits, at, min(max(counts), logits.shape[-1]))
    columns = (scores.logprobs, scores.ranks, scores.top_tokens, scores.top_logprobs)
    rows = zip(*map(_list, columns), counts, strict=True)
    return [
        TokenLogprobs(logprob, rank, tuple(top[:count]), tuple(of_top[:count]))
        for logprob, rank, top, of_top, count in rows
    ]


def _fingerprint(row: Tensor) -> bytes:
    return hashlib.sha256(row.contiguous().cpu().numpy().tobytes()).digest()


def _numbers(tensor: Tensor) -> list[int]:
    return _list(tensor)


def _list(tensor: Tensor) -> list[Any]:
    return tensor.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
