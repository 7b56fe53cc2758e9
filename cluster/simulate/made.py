"""Traces out of nothing but a seed, for what no public trace shows. Knows no cluster."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from cluster.simulate.trace import Trace, TraceError, unique_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SINGLE = "single-turn:"
FLIP = "flip:"
MADE = (SINGLE, FLIP)
_RATE = 8.0
_PROMPT_TOKENS = (256, 4096)
_OUTPUT_TOKENS = (64, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Requests of one kind, Poisson, lengths uniform."""

    seconds: float
    requests_per_second: float
    """For each worker."""
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]


LONG_PROMPTS = Phase(seconds=300, requests_per_second=0.6, prompt_tokens=(16_000, 32_000), output_tokens=(64, 128))
"""Four prefill workers for each decode worker serve it, whose links take in no more, and are at six sevenths then."""
LONG_ANSWERS = Phase(seconds=50, requests_per_second=9.75, prompt_tokens=(128, 512), output_tokens=(800, 1600))
"""One prefill worker for at least seven decode workers, whose slots are full at five sixths then."""
PHASES = (LONG_PROMPTS, LONG_ANSWERS, LONG_PROMPTS)
"""About as many requests of each kind, so that no fixed split is good by serving one kind only."""


def made_trace(source: str, block_tokens: int) -> Trace:
    """Made by what its name says. Raises TraceError.

    single-turn:N  N requests that share nothing, 8 a second (Poisson), lengths uniform
    flip:N         for N workers: long prompts, then long answers, then long prompts again
    """
    kind = next(kind for kind in MADE if source.startswith(kind))
    count = source.removeprefix(kind)
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise TraceError(f"{source!r}: say how many, as in {SINGLE}512 requests or {FLIP}64 workers")
    if kind == FLIP:
        return flipping(int(count), PHASES, block_tokens)
    requests = tuple(unique_blocks(_prompts(int(count)), block_tokens))
    note = f"made: {_RATE:g} requests a second, prompts of {_PROMPT_TOKENS} and answers of {_OUTPUT_TOKENS} tokens"
    return Trace(name=source, block_tokens=block_tokens, requests=requests, notes=(note,))


def flipping(workers: int, phases: Sequence[Phase], block_tokens: int) -> Trace:
    """Phase after phase, none of them slowly."""
    requests = tuple(unique_blocks(_phases(workers, phases), block_tokens))
    notes = tuple(
        f"made: {phase.seconds:g} s of {workers * phase.requests_per_second:.4g} requests a second, prompts of "
        f"{phase.prompt_tokens} and answers of {phase.output_tokens} tokens"
        for phase in phases
    )
    return Trace(name=f"{FLIP}{workers}", block_tokens=block_tokens, requests=requests, notes=notes)


def _phases(workers: int, phases: Sequence[Phase]) -> Iterator[tuple[float, int, int]]:
    dice, begin = random.Random(0), 0.0
    for phase in phases:
        at, begin = begin, begin + phase.seconds
        while (at := at + dice.expovariate(workers * phase.requests_per_second)) < begin:
            yield at, dice.randint(*phase.prompt_tokens), dice.randint(*phase.output_tokens)


def _prompts(count: int) -> Iterator[tuple[float, int, int]]:
    dice = random.Random(0)
    for arrival in accumulate(dice.expovariate(_RATE) for _ in range(count)):
        yield arrival, dice.randint(*_PROMPT_TOKENS), dice.randint(*_OUTPUT_TOKENS)
