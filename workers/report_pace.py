"""When the engine's news are told to the scheduler. Knows kinds of news and times, not what is told.

A report costs the worker and the scheduler a millisecond of CPU each: while a batch only decodes,
one each step would cost more than bringing the tokens to the clients.
"""

from __future__ import annotations

LOAD_SECONDS = 0.1
"""What a placement depends on (arrivals, prompts computed, room made) is told at most this often. What
the scheduler placed meanwhile it counts itself."""
PROGRESS_SECONDS = 1.0
"""Tokens decoded, and the blocks they filled."""
HEARTBEAT_SECONDS = 0.8
"""Told even when nothing changed. Under a second: it is how a lost report is found out when nothing follows it."""


class ReportPace:
    """Asked once after each step, idle ones too."""

    def __init__(self) -> None:
        self._reported = float("-inf")
        self._load_changed = True
        self._progressed = False
        self._settled = True

    def is_due(self, now: float, *, load_changed: bool, progressed: bool, urgent: bool = False) -> bool:
        """Whether to report now, after a step that computed something (`progressed`) or did not.

        `urgent` news, as a wanted full report, are told as soon as changes of load are.
        """
        self._load_changed = self._load_changed or load_changed or urgent
        self._progressed = self._progressed or progressed
        changed = self._load_changed or self._progressed
        self._settled = changed and not progressed
        age = now - self._reported
        due = (
            self._settled
            or (self._load_changed and age >= LOAD_SECONDS)
            or (self._progressed and age >= PROGRESS_SECONDS)
            or age >= HEARTBEAT_SECONDS
        )
        if due:
            self._reported, self._load_changed, self._progressed = now, False, False
        return due

    @property
    def settled(self) -> bool:
        """Whether the engine has just fallen idle."""
        return self._settled
