"""How often a part of the cluster may die before nobody tries any more."""

from __future__ import annotations

from cluster.pools.watch import Deaths


def test_who_dies_again_and_again_is_given_up() -> None:
    deaths = Deaths(5)
    for second in range(5):
        deaths.add(float(second))
        assert not deaths.too_many
    deaths.add(5.0)
    assert deaths.too_many
    assert str(deaths) == "6 times within 10 minutes"


def test_a_death_now_and_then_is_forgotten() -> None:
    deaths = Deaths(5)
    for hour in range(100):
        deaths.add(hour * 3600.0)
    assert not deaths.too_many
