"""Tokens for a trace's requests: equal blocks of content get equal tokens. Knows traces, no cluster.

Answers are made up as well, and asked for by teacher forcing: then a conversation's next turn begins
with what the cluster said, as in the trace, and every answer has the trace's length.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.simulate.trace import TraceError

if TYPE_CHECKING:
    from cluster.simulate.trace import Trace, TraceRequest

_TOKENS: Final = range(32, 256)
"""Every model has them, and they end no answer."""


class Wanted(NamedTuple):
    """One request to send."""

    arrival: float
    """Seconds since the trace began."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def wanted_of(trace: Trace, request: TraceRequest, number: int) -> Wanted:
    """The trace's request of that number, in tokens."""
    full = request.blocks[: request.prompt_tokens // trace.block_tokens]
    # The block in which the prompt ends and the answer begins has the name that the next turn gives it.
    after = request.answer_blocks or request.blocks[len(full) :]
    row = [token for block in (*full, *after) for token in _content(block, trace.block_tokens)]
    prompt, said = row[: request.prompt_tokens], row[request.prompt_tokens :] if request.answer_blocks else []
    said += _content(-1 - number, max(0, request.output_tokens - len(said)))
    return Wanted(request.arrival, tuple(prompt), tuple(said[: request.output_tokens]))


def shrunk(trace: Trace, factor: int) -> Trace:
    """Everything so many times shorter, and shared as before. Raises TraceError when blocks don't divide by it."""
    if factor == 1:
        return trace
    if trace.block_tokens % factor:
        raise TraceError(f"blocks of {trace.block_tokens} tokens can't be {factor} times shorter: choose a divisor")
    block_tokens = trace.block_tokens // factor
    requests = tuple(_shrunk(request, factor) for request in trace.requests)
    note = f"{factor} times shorter: blocks of {block_tokens} tokens"
    return replace(trace, block_tokens=block_tokens, requests=requests, notes=(*trace.notes, note))


def _shrunk(request: TraceRequest, factor: int) -> TraceRequest:
    """Rounded down, so that as many blocks are full as before."""
    prompt_tokens, output_tokens = max(1, request.prompt_tokens // factor), max(1, request.output_tokens // factor)
    return replace(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def fitting(trace: Trace, max_context: int) -> Trace:
    """Without what no worker could hold. Raises TraceError when nothing is left."""
    fits = tuple(one for one in trace.requests if one.prompt_tokens + one.output_tokens <= max_context)
    missing = len(trace.requests) - len(fits)
    if not fits:
        raise TraceError(f"no request of {trace.name} fits into the {max_context:,} tokens of this model: use --shrink")
    note = f"{missing:,} requests longer than {max_context:,} tokens left out"
    return replace(trace, requests=fits, notes=(*trace.notes, note) if missing else trace.notes)


def _content(block: int, count: int) -> list[int]:
    """The first so many tokens of a block."""
    return random.Random(block).choices(_TOKENS, k=count)
