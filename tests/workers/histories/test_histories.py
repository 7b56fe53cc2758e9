"""Whatever the network does and whoever dies: every request ends in time, rightly or not at all, and no block is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

FAULTS = (
    "lost call",
    "lost answer",
    "doubled call",
    "late call",
    "death",
    "pause",
    "partition",
    "cut link",
    "cancel",
    "full cache",
)
IN_CI = 10_000
AT_LEAST = 100


def shown(what: str, counts: Counter[str]) -> None:
    print(f"\n{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def test_ten_thousand_histories_end_and_leave_every_block_free(
    play: Callable[..., int], kind: Any, tallies: Any
) -> None:
    played = play(kind(faults=FAULTS), range(IN_CI))
    print(f"\n{played} histories")
    for what in ("states", "transitions", "faults", "ends"):
        shown(what, getattr(tallies, what))
    for counts in (tallies.states, tallies.faults):
        rare = {name: count for name, count in counts.items() if count < AT_LEAST}
        assert not rare, f"fewer than {AT_LEAST}: {rare}"
