"""Which tokens a sequence has, and how often its answer has each. Knows no batch and no penalty.

A pure function of the sequence's tokens, kept up token by token: what a new one costs doesn't
depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor


class TokenCounts:
    """Grows with its sequence. Made anew from the tokens wherever the sequence goes on."""

    def __init__(self, prompt: SequenceOf[int]) -> None:
        """`prompt` tokens are there from the start, with a count of 0."""
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = torch.tensor(list(self._places), dtype=torch.int64)
        self._counts = torch.zeros(len(self._places))
        self._read = 0

    def follow(self, tokens: SequenceOf[int], start: int) -> None:
        """`tokens[start:]` is the answer so far; what was read before is not read again."""
        for token in tokens[start + self._read :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._grow()
            self._tokens[place] = token
            self._counts[place] += 1
            self._read += 1

    @property
    def tokens(self) -> Tensor:
        """[distinct] ids, in the order of their first appearance."""
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> Tensor:
        """[distinct] fp32: how often the answer has each."""
        return self._counts[: len(self._places)]

    def _grow(self) -> None:
        more = max(32, len(self._tokens))
        self._tokens = torch.cat((self._tokens, self._tokens.new_zeros(more)))
        self._counts = torch.cat((self._counts, self._counts.new_zeros(more)))
