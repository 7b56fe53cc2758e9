"""The life of one hand-off, both sides, in one table. Knows no block and no network.

    NEW ─▶ GRANTED ─▶ PACKING ⇄ SENDING ─▶ LANDED ─▶ COMMITTED ─▶ RELEASED
     ╰────────┴──────────┴─────────┴─────────┴──▶ ABORTED · EXPIRED · FAILED

            sender (prefill)                        receiver (decode)
NEW         ordered, not yet dequeued               placed, prefill not yet ready
GRANTED     the ticket is here                      blocks are set aside for it
PACKING     blocks being copied to a parcel         ·
SENDING     a parcel is on the link                 a parcel is announced
LANDED      all parcels left                        all blocks are here
COMMITTED   decode said so                          the sequence runs on them
RELEASED    its blocks are free again               prefill was told

ABORTED: the request was cancelled or ended. EXPIRED: no progress within the lease. FAILED: the
link or the peer broke. All three are legal from every live state, and final.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from diptych.types import TransferId


class State(Enum):
    NEW = "new"
    GRANTED = "granted"
    PACKING = "packing"
    SENDING = "sending"
    LANDED = "landed"
    COMMITTED = "committed"
    RELEASED = "released"
    ABORTED = "aborted"
    EXPIRED = "expired"
    FAILED = "failed"


FINAL = frozenset({State.RELEASED, State.ABORTED, State.EXPIRED, State.FAILED})
_ENDS = frozenset({State.ABORTED, State.EXPIRED, State.FAILED})

# A hand-off with nothing to send goes from GRANTED to LANDED at once.
TABLE: Mapping[State, frozenset[State]] = {
    State.NEW: _ENDS | {State.GRANTED},
    State.GRANTED: _ENDS | {State.PACKING, State.SENDING, State.LANDED},
    State.PACKING: _ENDS | {State.SENDING},
    State.SENDING: _ENDS | {State.PACKING, State.LANDED},
    State.LANDED: _ENDS | {State.COMMITTED},
    State.COMMITTED: frozenset({State.RELEASED, State.EXPIRED, State.FAILED}),
    **{state: frozenset[State]() for state in FINAL},
}


@dataclass(slots=True)
class Tally:
    """How often each transition happened, and a fail point at each: `on_transition` may raise or stop."""

    transitions: Counter[tuple[State, State]] = field(default_factory=Counter[tuple[State, State]])
    on_transition: Callable[[TransferId, State, State], None] | None = None

    def ended(self, state: State) -> int:
        """Hand-offs that ended in this state."""
        return sum(count for (_, after), count in self.transitions.items() if after is state)


@dataclass(slots=True, eq=False)
class Transfer:
    """One side's view of a hand-off."""

    id: TransferId
    tally: Tally
    state: State = State.NEW
    reason: str = ""

    @property
    def live(self) -> bool:
        """Whether anything may still happen to it."""
        return self.state not in FINAL

    def advance(self, to: State, reason: str = "") -> None:
        """Take a transition of the table; any other is a bug."""
        if self.state is to:
            return  # another parcel of the same hand-off
        assert to in TABLE[self.state], f"transfer {self.id}: {self.state.value} → {to.value} is not in the table"
        if self.tally.on_transition:
            self.tally.on_transition(self.id, self.state, to)
        self.tally.transitions[self.state, to] += 1
        self.state, self.reason = to, reason

    def end(self, how: State, reason: str = "") -> bool:
        """Whether it was still live: the first end counts, later ones change nothing."""
        if not self.live:
            return False
        self.advance(how, reason)
        return True
