"""What an engine's steps took, few enough for a report: steps alike become one. Knows no engine and no clock."""

from __future__ import annotations

from itertools import count
from math import fsum
from operator import mul
from typing import TYPE_CHECKING

from diptych.types import StepSample, TransferSample

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from workers.engine.batching import StepPlan

STEP_SAMPLES = 16
"""In a report, at most."""
TRANSFER_SAMPLES = 32
"""In a report, at most: the latest."""
_KEPT = 64


class StepSamples:
    """Of one engine since they were last taken."""

    def __init__(self) -> None:
        self._samples: list[StepSample] = []

    def add(self, sample: StepSample) -> None:
        """A step that computed something."""
        self._samples.append(sample)
        if len(self._samples) >= _KEPT:
            self._samples = list(fold_steps(self._samples))

    def take(self) -> tuple[StepSample, ...]:
        """They are told once."""
        samples, self._samples = self._samples, []
        return fold_steps(samples)


def sample_of(plan: StepPlan, seconds: float) -> StepSample:
    """Of a step that took so long; read before it changes its sequences."""
    chunks, decodes = plan.chunks, plan.decodes
    return StepSample(
        steps=1,
        prompt_tokens=sum([work.count for work in chunks]),
        prompt_pairs=sum([work.count * work.start + work.count * (work.count + 1) // 2 for work in chunks]),
        decode_rows=len(decodes),
        decode_context=sum([len(sequence.tokens) for sequence in decodes]),
        seconds=seconds,
    )


def fold_steps(samples: Sequence[StepSample]) -> tuple[StepSample, ...]:
    """At most STEP_SAMPLES means of steps alike; every step counts in exactly one.

    Alike are those whose prompt tokens and whose decoded rows lie between the same powers of two (of four,
    of sixteen, … while those are too many), so that a step of prompts never hides in the mean of a thousand
    that only decoded.
    """
    for coarseness in count():
        groups: dict[tuple[int, int], list[StepSample]] = {}
        for sample in samples:
            key = (_size(sample.prompt_tokens, coarseness), _size(sample.decode_rows, coarseness))
            groups.setdefault(key, []).append(sample)
        if len(groups) <= STEP_SAMPLES:
            return tuple(_mean(group) for group in groups.values())
    raise AssertionError


def latest_transfers(samples: Iterable[TransferSample]) -> tuple[TransferSample, ...]:
    """As many as fit into a report."""
    return tuple(samples)[-TRANSFER_SAMPLES:]


def _size(number: float, coarseness: int) -> int:
    """0 is alike to 0 alone."""
    return 1 + (int(number).bit_length() >> coarseness) if number else 0


def _mean(group: Sequence[StepSample]) -> StepSample:
    if len(group) == 1:
        return group[0]
    steps = sum(sample.steps for sample in group)
    columns = zip(*(sample[1:] for sample in group), strict=True)
    weights = [sample.steps / steps for sample in group]
    return StepSample(steps, *(fsum(map(mul, weights, column)) for column in columns))
