"""A trace: who asked when, how much, and which blocks of content. Knows no file format and no cluster.

A block of content is a number; equal numbers mean equal tokens and everything before them. The
last block of a prompt may be partial. Traces record prompts only, but the KV of a finished answer
stays cached too: `with_answers` finds what the answer's blocks are called in the turn that follows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import count, groupby, pairwise
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_COARSE_SECONDS = 0.5
"""Times that are apart by multiples of so much or more were rounded."""
_ROUNDING = 0.01


class TraceError(ValueError):
    """A trace that can't be used: which one, where, what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request as its trace has it."""

    arrival: float
    """Seconds since the trace began."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """The prompt's content, ceil(prompt_tokens / block_tokens) of them."""
    answer_blocks: tuple[int, ...] = ()
    """The content of the blocks that the answer completes, as far as a later turn tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order of their file, by rising arrival."""

    name: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()
    """What was done to it."""

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival - self.requests[0].arrival

    def head(self, requests: int) -> Trace:
        """Only so many."""
        return replace(self, requests=self.requests[:requests])

    def spread(self, seed: int) -> Trace:
        """Where arrivals were rounded to a bin: uniform inside it, in the order of the file."""
        width = _bin_of(self.requests)
        if not width:
            return self
        dice = random.Random(seed)
        spread: list[TraceRequest] = []
        for start, inside in groupby(self.requests, key=attrgetter("arrival")):
            binned = list(inside)
            offsets = sorted(dice.random() * width for _ in binned)
            spread += [replace(one, arrival=start + offset) for one, offset in zip(binned, offsets, strict=True)]
        note = f"arrivals spread inside their {width:g} s bins"
        return replace(self, requests=tuple(sorted(spread, key=attrgetter("arrival"))), notes=(*self.notes, note))


def _bin_of(requests: Sequence[TraceRequest]) -> float:
    """The step that nearly all times are apart by, if it is coarse and requests share times; else 0.

    Rounding to the bin was not exact either.
    """
    times = sorted({one.arrival for one in requests})
    gaps = [after - before for before, after in pairwise(times)]
    if not gaps or len(times) > 0.9 * len(requests):
        return 0.0
    width = round(median(gaps), 2)
    whole = sum(abs(gap / width - round(gap / width)) < _ROUNDING for gap in gaps) if width >= _COARSE_SECONDS else 0
    return width if whole > 0.9 * len(gaps) else 0.0


def unique_blocks(prompts: Iterable[tuple[float, int, int]], block_tokens: int) -> Iterator[TraceRequest]:
    """Requests (arrival, prompt tokens, output tokens) that share nothing with one another."""
    fresh = count()
    for arrival, prompt_tokens, output_tokens in prompts:
        blocks = tuple(next(fresh) for _ in range(-(-prompt_tokens // block_tokens)))
        yield TraceRequest(arrival=arrival, prompt_tokens=prompt_tokens, output_tokens=output_tokens, blocks=blocks)


def with_answers(trace: Trace) -> Trace:
    """Each request's answer named as its next turn names it.

    The next turn of a request is the first later one that begins with all its full blocks, the last
    of which no earlier request had, goes on with content never seen, and is long enough to hold
    prompt and answer.
    """
    turns = dict(_next_turns(trace))
    requests = tuple(
        replace(one, answer_blocks=_answer_blocks(one, trace.requests[turns[place]], trace.block_tokens))
        if place in turns
        else one
        for place, one in enumerate(trace.requests)
    )
    note = f"{len(turns):,} of {len(requests):,} requests are continued by a later turn"
    return replace(trace, requests=requests, notes=(*trace.notes, note))


def with_told_turns(trace: Trace, parents: Mapping[int, int]) -> Trace:
    """As `with_answers`, where the trace says whose next turn a request is: (place, place of its parent)."""
    requests = list(trace.requests)
    for place, parent in parents.items():
        before, after = requests[parent], trace.requests[place]
        if not before.answer_blocks and _could_follow(before, after):
            requests[parent] = replace(before, answer_blocks=_answer_blocks(before, after, trace.block_tokens))
    return replace(trace, requests=tuple(requests))


def _next_turns(trace: Trace) -> Iterator[tuple[int, int]]:
    """(place of a request, place of its next turn)."""
    seen: set[int] = set()
    ends: dict[int, int] = {}
    """The last full block of a request that was the first to have it -> its place."""
    for place, one in enumerate(trace.requests):
        full = one.blocks[: one.prompt_tokens // trace.block_tokens]
        depth = next((depth for depth, block in enumerate(full) if block not in seen), len(full))
        before = ends.get(full[depth - 1]) if 0 < depth < len(full) else None
        if before is not None and _could_follow(trace.requests[before], one):
            del ends[full[depth - 1]]
            yield before, place
        if depth < len(full):
            ends[full[-1]] = place
        seen.update(full)


def _could_follow(before: TraceRequest, after: TraceRequest) -> bool:
    return after.prompt_tokens >= before.prompt_tokens + before.output_tokens


def _answer_blocks(before: TraceRequest, after: TraceRequest, block_tokens: int) -> tuple[int, ...]:
    first = before.prompt_tokens // block_tokens
    return after.blocks[first : (before.prompt_tokens + before.output_tokens) // block_tokens]
