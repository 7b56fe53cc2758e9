"""How fast workers and links are, learned from what they measured. Knows no request, queue or clock.

    step      seconds = base + a * prompt tokens + b * prompt pairs + c * decode rows + d * decode context
    transfer  seconds = latency + bytes / rate, all of it and the part that computing didn't hide

Both are least squares of relative errors with forgetting, over non-negative coefficients: a step of
a millisecond counts as much as one of a second, and a stall, whose features over its seconds are
small, moves little. A worker's own samples are joined by a few that stand for all workers of its
kind, so a newcomer starts from their mean and a direction it never takes (a decode worker's
prompts) stays theirs.

Until a kind has samples only the proportions of its prior count: its size follows the first ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import mul
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diptych.types import StepSample, TransferSample

Array: TypeAlias = NDArray[np.float64]

STEP_PRIOR = (5e-3, 1e-4, 1e-9, 1e-4, 1e-8)
"""Seconds per step, prompt token, prompt pair, decode row and token of decode context."""
TRANSFER_PRIOR = (1e-3, 1e-9)
"""Seconds per transfer and byte."""
EXPOSED_PRIOR = (1e-3, 1e-10)

_MEMORY = 512.0
"""Samples after which a sample counts a third."""
_KIND_WORTH = 8.0
"""Samples that the kind's mean counts for at a worker with its own."""
_PRIOR_WORTH = 0.02
"""Samples that each proportion of the prior counts for."""
_OUTLIER = 3.0
"""Times the usual error: beyond that an error counts in proportion, not in square."""
_SWEEPS = 60


@dataclass(slots=True)
class Regression:
    """Sums from which non-negative coefficients are solved."""

    prior: Array
    matrix: Array = field(init=False)
    moment: Array = field(init=False)
    solution: Array = field(init=False)
    samples: float = 0.0
    """Forgotten ones counted less."""
    _usual_error: float = 0.5
    _unsolved: int = 0

    def __post_init__(self) -> None:
        self.matrix = np.zeros((len(self.prior), len(self.prior)))
        self.moment = np.zeros(len(self.prior))
        self.solution = self.prior.copy()

    def add(self, features: Array, value: float, scale: float) -> None:
        """A measurement; its error counts relative to `scale`."""
        features, value = features / scale, value / scale
        error = abs(float(features @ self.solution) - value)
        weight = min(1.0, _OUTLIER * self._usual_error / error) if error and self.samples >= _KIND_WORTH else 1.0
        self._usual_error += 0.05 * (min(error, _OUTLIER * self._usual_error) - self._usual_error)
        keep = 1.0 - 1.0 / _MEMORY
        self.matrix = keep * self.matrix + weight * np.outer(features, features)
        self.moment = keep * self.moment + (weight * value) * features
        self.samples = keep * self.samples + 1.0
        self._unsolved += 1

    @property
    def is_due(self) -> bool:
        """Whether an eighth of its samples, or many, are not in the solution yet."""
        return self._unsolved > min(self.samples / 8.0, _MEMORY / 16.0)

    def solve(self, others: Regression | None = None) -> None:
        """`others`: those of its kind, for what its own samples don't say."""
        if others is None or not others.samples:
            size = self._size()
            matrix = self.matrix + np.diag(_PRIOR_WORTH / (size * self.prior) ** 2)
            moment = self.moment + _PRIOR_WORTH / (size * self.prior)
            near = size * self.prior
        else:
            worth = _KIND_WORTH / others.samples
            matrix = self.matrix + worth * others.matrix
            # What keeps directions solvable that nobody has taken.
            matrix += np.diag(1e-6 / np.maximum(others.solution, 1e-6 * others.prior) ** 2)
            moment = self.moment + (matrix - self.matrix) @ others.solution
            near = others.solution
        # The descent is slow along valleys: it begins at what is known before a few samples have been seen.
        start = near if self.samples <= _KIND_WORTH else self.solution
        self.solution = non_negative(matrix, moment, start)
        self._unsolved = 0

    def _size(self) -> float:
        """By which the prior explains the samples best."""
        told = float(self.prior @ self.matrix @ self.prior)
        return float(self.prior @ self.moment) / told if told else 1.0


def non_negative(matrix: Array, moment: Array, start: Array) -> Array:
    """The x >= 0 that minimises x'Ax - 2b'x, by coordinate descent (scale-free, from a near start)."""
    x, rows, target = start.tolist(), matrix.tolist(), moment.tolist()
    for _ in range(_SWEEPS):
        moved = False
        for place, row in enumerate(rows):
            rest = target[place] - sum(map(mul, row, x))
            better = max(0.0, x[place] + rest / row[place])
            moved = moved or abs(better - x[place]) > 1e-4 * better
            x[place] = better
        if not moved:
            break
    return np.array(x)


Key = TypeVar("Key")


@dataclass(slots=True)
class Shared(Generic[Key]):
    """Coefficients of many members of a few kinds."""

    prior: Array
    _kinds: dict[str, Regression] = field(default_factory=dict[str, Regression])
    _members: dict[Key, Regression] = field(default_factory=dict[Key, Regression])

    def of(self, key: Key, kind: str) -> Array:
        """Its own, or its kind's mean as long as it has measured nothing."""
        member = self._members.get(key)
        return self.mean(kind) if member is None else member.solution

    def mean(self, kind: str) -> Array:
        """All members' of the kind together; the prior when there is no sample."""
        return self._kinds[kind].solution if kind in self._kinds else self.prior

    def __contains__(self, key: Key) -> bool:
        return key in self._members

    def learn(self, key: Key, kind: str, samples: Sequence[tuple[Array, float, float]]) -> bool:
        """(features, measured, what an error is relative to) of one member; whether its kind's mean moved."""
        whole = self._kinds.setdefault(kind, Regression(self.prior))
        member = self._members.setdefault(key, Regression(self.prior))
        for sample in samples:
            whole.add(*sample)
            member.add(*sample)
        if moved := whole.is_due:
            whole.solve()
        if member.is_due:
            member.solve(whole)
        return moved

    def forget(self, key: Key) -> None:
        """A member that is gone; its kind keeps what it taught."""
        self._members.pop(key, None)


def step_features(sample: StepSample) -> tuple[Array, float, float]:
    """A step as `Shared` learns it."""
    features = (1.0, sample.prompt_tokens, sample.prompt_pairs, sample.decode_rows, sample.decode_context)
    return np.array(features), sample.seconds, sample.seconds


def transfer_features(sample: TransferSample) -> tuple[Array, float, float]:
    """How long a transfer took, as `Shared` learns it."""
    return np.array((1.0, sample.nbytes)), sample.seconds, sample.seconds


def exposed_features(sample: TransferSample) -> tuple[Array, float, float]:
    """What of it somebody waited for; its error counts relative to the whole."""
    return np.array((1.0, sample.nbytes)), sample.exposed_seconds, max(sample.seconds, sample.exposed_seconds)


@dataclass(slots=True)
class Residual:
    """What the prediction of one path is short of, in seconds: a mean that forgets and that no single
    surprise moves by more than a few usual errors."""

    seconds: float = 0.0
    samples: int = 0
    _usual_error: float = 0.0

    def learn(self, actual_seconds: float, predicted_seconds: float) -> None:
        """`predicted_seconds`: without this residual."""
        error = actual_seconds - predicted_seconds - self.seconds
        self.samples += 1
        share = 1.0 / min(self.samples, 32)
        bound = math.inf if self.samples <= 4 else _OUTLIER * self._usual_error
        self.seconds += share * min(max(error, -bound), bound)
        self._usual_error += share * (min(abs(error), bound) - self._usual_error)
