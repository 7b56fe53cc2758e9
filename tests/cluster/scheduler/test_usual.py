"""What is usual: learned from what was placed, whatever its scale, and forgotten when it changes."""

from __future__ import annotations

import random

import pytest

from cluster.scheduler.usual import KEPT, Usual


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_nearly_all_keep_to_it_whatever_the_scale(scale: float) -> None:
    dice, usual, above = random.Random(1), Usual(), 0
    for place in range(20_000):
        waited = scale * dice.lognormvariate(0.0, 1.0)
        if place >= 2_000:
            assert usual.seconds is not None
            above += waited > usual.seconds
        usual.add(waited)
    assert above / 18_000 == pytest.approx(1 - KEPT, rel=0.25)


def test_it_follows_a_change() -> None:
    usual = Usual()
    assert usual.seconds is None
    for _ in range(100):
        usual.add(0.1)
    for _ in range(100):
        usual.add(10.0)
    assert usual.seconds is not None
    assert usual.seconds > 9.0


def test_nothing_to_wait_is_no_error() -> None:
    usual = Usual()
    usual.add(0.0)
    usual.add(0.0)
    assert usual.seconds == pytest.approx(1e-6, rel=0.2)
