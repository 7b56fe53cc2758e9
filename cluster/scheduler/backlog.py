"""Prompts that were placed on one worker and that it hasn't computed yet. Knows no prompt's content.

A report says how many tokens wait, not how long they take nor whose they are. Between reports work
goes on at the predicted pace, the more important ranks first and each in order; a report then says
how much of it is really done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

RANKS: Final = 3
"""High, normal, low."""
TRANSIT_SECONDS: Final = 0.02
"""How long a placement may be on its way: a report that comes sooner may not count it."""


@dataclass(slots=True)
class _Placed:
    at: float
    tokens: float
    seconds: float
    left: float = 1.0
    """The share that isn't computed."""

    @property
    def tokens_left(self) -> float:
        return self.left * self.tokens

    @property
    def seconds_left(self) -> float:
        return self.left * self.seconds


class Backlog:
    """Of one worker."""

    def __init__(self) -> None:
        self._placed: tuple[deque[_Placed], ...] = tuple(deque[_Placed]() for _ in range(RANKS))
        self._until = 0.0
        """So far the work is done, as predicted."""

    def place(self, at: float, rank: int, tokens: float, seconds: float) -> None:
        """One more, behind all others of its rank."""
        self._pass_time(at)
        self._placed[rank].append(_Placed(at, tokens, seconds))

    def reported(self, at: float, waiting_tokens: int, seconds_per_token: float) -> list[float]:
        """Seconds of work left before a newcomer of each rank, by a report of `at`.

        `seconds_per_token`: of what we didn't place ourselves, which counts as high.
        """
        self._pass_time(at)
        all_placed = [one for placed in self._placed for one in placed]
        expected = sum(one.tokens_left for one in all_placed)
        # Whether it counts those that were placed a moment ago can't be known: either way is as expected.
        most = waiting_tokens + sum(one.tokens for one in all_placed if at - one.at < TRANSIT_SECONDS)
        if expected > most:
            self._finish(expected - most)
        elif expected < waiting_tokens:
            self._put_back(at, waiting_tokens - expected, seconds_per_token)
        seconds = [sum(one.seconds_left for one in placed) for placed in self._placed]
        return [sum(seconds[: rank + 1]) for rank in range(RANKS)]

    def _pass_time(self, at: float) -> None:
        seconds, self._until = at - self._until, max(at, self._until)
        for placed in self._placed:
            while placed and seconds >= placed[0].seconds_left:
                seconds -= placed.popleft().seconds_left
            if placed and seconds > 0.0:
                placed[0].left -= seconds / placed[0].seconds
                return

    def _finish(self, tokens: float) -> None:
        """Faster than predicted."""
        for placed in self._placed:
            while placed and tokens >= placed[0].tokens_left:
                tokens -= placed.popleft().tokens_left
            if placed and tokens > 0.0:
                placed[0].left -= tokens / placed[0].tokens
                return

    def _put_back(self, at: float, tokens: float, seconds_per_token: float) -> None:
        """Slower than predicted, or not placed by us."""
        for placed in self._placed:
            if placed and placed[0].tokens:
                share = min(1.0 - placed[0].left, tokens / placed[0].tokens)
                placed[0].left += share
                tokens -= share * placed[0].tokens
        if tokens >= 1.0:
            self._placed[0].appendleft(_Placed(at - TRANSIT_SECONDS, tokens, tokens * seconds_per_token))
