"""Traces out of nothing but a seed, for what no public trace shows. Knows no cluster."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import TYPE_CHECKING

from cluster.simulate.trace import Trace, TraceError, unique_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

MADE = "single-turn:"
_RATE = 8.0
_PROMPT_TOKENS = (256, 4096)
_OUTPUT_TOKENS = (64, 512)


def made_trace(source: str, block_tokens: int) -> Trace:
    """`single-turn:N` is N requests that share nothing, 8 a second (Poisson), lengths uniform. Raises TraceError."""
    count = source.removeprefix(MADE)
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise TraceError(f"{source!r}: say how many requests, as in {MADE}512")
    requests = tuple(unique_blocks(_prompts(int(count)), block_tokens))
    note = f"made: {_RATE:g} requests a second, prompts of {_PROMPT_TOKENS} and answers of {_OUTPUT_TOKENS} tokens"
    return Trace(name=source, block_tokens=block_tokens, requests=requests, notes=(note,))


def _prompts(count: int) -> Iterator[tuple[float, int, int]]:
    dice = random.Random(0)
    for arrival in accumulate(dice.expovariate(_RATE) for _ in range(count)):
        yield arrival, dice.randint(*_PROMPT_TOKENS), dice.randint(*_OUTPUT_TOKENS)
