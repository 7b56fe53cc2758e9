"""Named fail points: one at each transition of a hand-off, on either side. Inert unless asked for. Knows no transfer.

`DIPTYCH_FAIL_AT="sender:sending>landed:kill"` in a worker's environment: the first time that one of
its hand-offs goes from SENDING to LANDED on the sending side, the process kills itself. Several are
separated by commas; `*` stands for any state. What happens, once each:

kill    SIGKILL to itself: nothing is said, nothing is closed
stop    SIGSTOP to itself: it goes on, as if nothing had been, with SIGCONT
raise   `FailPoint`, which ends the engine as a bug would
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from diptych.errors import InvalidRequest
from diptych.types import TransferId
from workers.transfer.states import TABLE, State

VARIABLE = "DIPTYCH_FAIL_AT"
TransferSide: TypeAlias = Literal["sender", "receiver"]
OnTransition: TypeAlias = Callable[[TransferId, State, State], None]
_ACTIONS = ("kill", "stop", "raise")


class FailPoint(Exception):
    """Somebody asked for it."""


class _Point(NamedTuple):
    side: str
    before: str
    after: str
    action: str

    def __str__(self) -> str:
        return f"{self.side}:{self.before}>{self.after}:{self.action}"

    def is_at(self, before: State, after: State) -> bool:
        return self.before in ("*", before.value) and self.after in ("*", after.value)


def fail_points(side: TransferSide, environment: Mapping[str, str]) -> OnTransition | None:
    """What to do at the transitions of this side; None without a fail point. Raises InvalidRequest."""
    points = [_parsed(word) for word in environment.get(VARIABLE, "").split(",") if word]
    armed = [point for point in points if point.side == side]

    def pass_by(transfer: TransferId, before: State, after: State) -> None:
        point = next((point for point in armed if point.is_at(before, after)), None)
        if point is not None:
            armed.remove(point)
            _act(point, transfer)

    return pass_by if armed else None


def _parsed(word: str) -> _Point:
    side, _, rest = word.strip().partition(":")
    transition, _, action = rest.partition(":")
    before, _, after = transition.partition(">")
    point = _Point(side, before, after, action)
    reached = any(point.is_at(state, to) for state, targets in TABLE.items() for to in targets)
    if side not in ("sender", "receiver") or action not in _ACTIONS or not reached:
        raise InvalidRequest(
            f"{VARIABLE}: {word!r} is no fail point; side:before>after:action has side sender or receiver, "
            f"a transition of the table (or *), and action {', '.join(_ACTIONS)}",
            param=VARIABLE,
        )
    return point


def _act(point: _Point, transfer: TransferId) -> None:
    if point.action == "raise":
        raise FailPoint(f"{point} of {transfer}")
    os.kill(os.getpid(), signal.SIGKILL if point.action == "kill" else signal.SIGSTOP)
