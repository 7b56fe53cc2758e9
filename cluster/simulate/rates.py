"""How long a step takes. Knows the formulas of `Constants`, no clock and no queue.

A step with prompts and decodes together pays the larger of the two bases (the weights are read once), the prompts'
arithmetic, and the decodes' reads of KV.
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import TYPE_CHECKING, NamedTuple

from diptych.types import StepSample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.simulate.constants import Constants
    from workers.engine.batching import Work


class Leap(NamedTuple):
    """Steps alike in a row: all decode the same sequences, whose KV grows by one token each a step."""

    steps: int
    first_seconds: float
    growth_seconds: float
    """Each step takes so much longer than the one before."""

    def seconds(self, steps: int) -> float:
        """Of the first so many."""
        return steps * self.first_seconds + self.growth_seconds * steps * (steps - 1) / 2

    def steps_begun(self, seconds: float) -> int:
        """How many are done or under way after so long; at least one."""
        if not self.growth_seconds:
            return min(self.steps, max(1, ceil(seconds / self.first_seconds)))
        half = self.growth_seconds / 2
        linear = self.first_seconds - half
        steps = max(1, ceil((sqrt(linear * linear + 4 * half * seconds) - linear) / (2 * half)))
        while steps > 1 and self.seconds(steps - 1) >= seconds:
            steps -= 1
        return min(steps, self.steps)


class StepRates:
    """The same for all workers of a cluster."""

    def __init__(self, constants: Constants) -> None:
        self._prefill = constants.prefill_seconds
        self._decode = constants.decode_step_seconds

    def chunk_seconds(self, tokens: int, cached: int) -> float:
        """A part of a prompt, without the step's base."""
        rates = self._prefill
        flops = rates.linear_flops * tokens + rates.attention_flops * tokens * (cached + tokens / 2)
        return flops / rates.flops

    def prompt_seconds(self, tokens: int, cached: int) -> float:
        """A prompt in one step of its own."""
        return self._prefill.base + self.chunk_seconds(tokens, cached)

    def mixed_seconds(self, chunks: Iterable[Work], rows: int, context: int) -> float:
        """One step with prompts, and perhaps `rows` sequences of `context` tokens in all that decode."""
        base = max(self._prefill.base, self._decode.base) if rows else self._prefill.base
        prompts = sum([self.chunk_seconds(work.count, work.start) for work in chunks])
        return base + prompts + self._decode.per_sequence * rows + self._decode.per_kv_token * context

    def leap(self, steps: int, rows: int, context: int) -> Leap:
        """Steps that only decode."""
        rates = self._decode
        first = rates.base + rates.per_sequence * rows + rates.per_kv_token * context
        return Leap(steps, first, rates.per_kv_token * rows)


def sample_of(steps: int, seconds: float, chunks: Iterable[Work], rows: int, context: int) -> StepSample:
    """What a real worker would tell of `steps` steps that took so long together."""
    works = tuple(chunks)
    return StepSample(
        steps=steps,
        prompt_tokens=sum([work.count for work in works]),
        prompt_pairs=sum([work.count * work.start + work.count * (work.count + 1) // 2 for work in works]),
        decode_rows=rows,
        decode_context=context + rows * (steps - 1) / 2,
        seconds=seconds / steps,
    )
