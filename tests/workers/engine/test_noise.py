"""The noise of a token depends on seed, choice and position, and on nothing else."""

from __future__ import annotations

import itertools

from workers.engine.noise import uniform


def test_it_is_a_pure_function_that_never_changes() -> None:
    assert [uniform(5, 0, 17), uniform(5, 0, 17)] == [0.41467702478798496] * 2
    assert 0 <= uniform(2**64 - 1, 2**63, 2**40) < 1


def test_each_argument_counts() -> None:
    assert len({uniform(*each) for each in itertools.product(range(10), repeat=3)}) == 1000


def test_it_is_even() -> None:
    values = sorted(uniform(1, 0, position) for position in range(10_000))
    # Kolmogorov and Smirnov: 1.63 / sqrt(n) is one case in a hundred; the values are fixed.
    assert max(abs(value - at / 10_000) for at, value in enumerate(values)) < 0.0163
