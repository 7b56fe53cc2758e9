"""Whatever the network does and whoever dies, every request ends in time, rightly or not at all; no block is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

FAULTS = (
    "lost call",
    "lost answer",
    "doubled call",
    "late call",
    "late answer",
    "death",
    "pause",
    "partition",
    "cut link",
    "stalled link",
    "cancel",
    "full cache",
)
CANCELS = ("cancel", "cancel", "late answer", "lost answer", "stalled link")
AT_LEAST = 100
LOANS = tuple((side, state) for side in ("lender", "borrower") for state in ("granted", "sending", "landed"))
RARE = {
    # The grant call is given up after a lease, too, and mostly first.
    "sender new>expired",
    # Nearly always something is ready to be sent when the ticket comes.
    "sender granted>aborted",
}


def shown(what: str, counts: Counter[str]) -> None:
    print(f"\n{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def test_ten_thousand_histories_end_and_leave_every_block_free(
    play: Callable[..., int], kind: Any, tallies: Any
) -> None:
    played = play(kind(faults=FAULTS), range(2200))
    played += play(kind(faults=CANCELS, most_faults=4, armed=1.0), range(100_000, 101_800))
    played += play(
        kind(faults=("cancel",), armed=1.0, states=(("receiver", "landed"),), troubles=("late answer", "lost answer")),
        range(110_000, 111_000),
    )
    played += play(kind(faults=("pause",), troubles=("lost call", "lost call")), range(120_000, 121_000))
    played += play(kind(faults=FAULTS, follow_ups=True, states=LOANS), range(130_000, 132_000))
    played += play(
        kind(faults=("cancel", "stalled link", "pause"), armed=1.0, follow_ups=True, states=LOANS),
        range(140_000, 143_000),
    )
    print(f"\n{played} histories")
    for what in ("states", "transitions", "faults", "ends"):
        shown(what, getattr(tallies, what))
    assert played >= 10_000
    sides = Counter[str]()
    for name, count in tallies.transitions.items():
        # The same code on both kinds of hand-off.
        sides[name.replace("lender", "sender").replace("borrower", "receiver")] += count
    reached = {name: count for name, count in sides.items() if name not in RARE}
    for counts in (tallies.states, reached, tallies.faults):
        few = {name: count for name, count in counts.items() if count < AT_LEAST}
        assert not few, f"fewer than {AT_LEAST}: {few}"
