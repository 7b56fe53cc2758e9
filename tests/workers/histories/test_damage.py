"""Parcels that arrive otherwise than they left: with a checksum on each no answer changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

CLASSES = ("header", "scales", "keys", "values", "padding", "ids", "generations", "swap")
ALWAYS_CAUGHT = ("generations",)
AT_LEAST = 100


@pytest.mark.timeout(900)
def test_ten_thousand_damaged_parcels_give_no_wrong_token(play: Callable[..., int], kind: Any, tallies: Any) -> None:
    """With `kv.verify = all`: whatever changed on its way, the answer is the clean run's."""
    seeds = iter(range(200_000, 300_000))
    while sum(tallies.faults.values()) < 10_000:
        play(kind(faults=(), damages=6, verify=("all",)), itertools.islice(seeds, 500))
    print(f"\n{dict(tallies.faults)}\n{dict(tallies.ends)}")
    assert set(tallies.ends) <= {"answered", "too long"}
    assert all(tallies.faults[f"damaged {name}"] >= AT_LEAST for name in CLASSES), tallies.faults


@pytest.mark.parametrize("verify", ["off", "sample"])
def test_what_less_verification_still_catches_is_known(
    play: Callable[..., int], kind: Any, tallies: Any, verify: str
) -> None:
    """Without a checksum only what contradicts a ticket is found: see docs/transfer.md for the shares."""
    print()
    for name in CLASSES:
        before, faults = tallies.ends["wrong"], sum(tallies.faults.values())
        play(kind(faults=(), damages=1, classes=(name,), verify=(verify,), may_be_wrong=True), range(400_000, 400_150))
        wrong = tallies.ends["wrong"] - before
        injected = sum(tallies.faults.values()) - faults
        print(f"kv.verify={verify}: {injected} parcels with other {name}: {wrong} wrong answers")
        assert name not in ALWAYS_CAUGHT or not wrong
