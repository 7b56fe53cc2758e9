"""How soon cached content is likely to be used again, learned from what was. Knows classes and ages, no blocks.

Ages count blocks taken since the last use: the clock of a pool that is full. An index of Gittins' kind
ranks them (as LHD does, Beckmann et al., NSDI 2018): the most reuses per unit of room and time that
keeping it for some while promises.
"""

from __future__ import annotations

from typing import TypeAlias

_OLDEST = 40
"""Ages of up to 2 ** 40, in powers of two."""
_DOUBT = 5.0
"""Blocks that all classes together count for, in a class that is rarely seen."""
_MEMORY = 16
"""After so many pools full of new blocks, what was learned counts half."""
_SLICES = 64
"""What is still unused is counted by the slice of a pool's blocks in which its wait began."""
_LESSONS = 4
"""In a pool full of new blocks."""
_LEAST = 1024
"""Blocks between lessons, in a small pool."""

_Counts: TypeAlias = list[float]


class ReuseOdds:
    """Of one pool; `classes` are numbered from 0."""

    def __init__(self, classes: int, size: int) -> None:
        self._slice = max(1, size // _SLICES)
        self._lesson = max(_LEAST, size // _LESSONS)
        self._fading = 0.5 ** (self._lesson / (_MEMORY * max(size, _LEAST)))
        self._used = [[0.0] * _OLDEST for _ in range(classes)]
        """By age in powers of two: ended by being used."""
        self._lost = [[0.0] * _OLDEST for _ in range(classes)]
        """Ended by being forgotten."""
        self._waiting: list[dict[int, int]] = [{} for _ in range(classes)]
        """By the slice of time in which it began."""
        self._next = self._lesson
        self.index: list[_Counts] | None = None
        """By class and age in powers of two; None until something was learned."""

    def began(self, group: int, now: int) -> None:
        """Content of that class is unused from now."""
        waiting, slice_ = self._waiting[group], now // self._slice
        waiting[slice_] = waiting.get(slice_, 0) + 1

    def used(self, group: int, since: int, now: int) -> None:
        """And was used."""
        self._end(group, since)
        self._used[group][(now - since).bit_length()] += 1

    def lost(self, group: int, since: int, now: int) -> None:
        """And nobody would notice any more if it were."""
        self._end(group, since)
        self._lost[group][(now - since).bit_length()] += 1

    def _end(self, group: int, since: int) -> None:
        waiting, slice_ = self._waiting[group], since // self._slice
        if waiting[slice_] == 1:
            del waiting[slice_]
        else:
            waiting[slice_] -= 1

    def learn(self, now: int) -> None:
        """Call often; it works once in a quarter of a pool."""
        if now < self._next:
            return
        self._next = now + self._lesson
        left = [self._left(group, now) for group in range(len(self._used))]
        all_used = [sum(column, 0.0) for column in zip(*self._used, strict=True)]
        if not any(all_used):
            return
        all_left = [sum(column, 0.0) for column in zip(*left, strict=True)]
        oldest = max(age for age in range(_OLDEST) if all_used[age] or all_left[age]) + 1
        usual = _hazards(all_used[:oldest], all_left, [0.0] * oldest)
        self.index = [
            _index(_hazards(used[:oldest], gone, usual)) + [0.0] * (_OLDEST - oldest)
            for used, gone in zip(self._used, left, strict=True)
        ]
        for counts in (*self._used, *self._lost):
            counts[:] = [count * self._fading for count in counts]

    def _left(self, group: int, now: int) -> _Counts:
        """What reached an age and was not used there: forgotten, or still waiting."""
        left = self._lost[group].copy()
        for slice_, count in self._waiting[group].items():
            left[max(0, now - slice_ * self._slice - self._slice // 2).bit_length()] += count
        return left

    def check(self) -> None:
        """No wait ended that didn't begin."""
        assert all(count > 0 for waiting in self._waiting for count in waiting.values()), "a wait ended twice"


def _hazards(used: _Counts, left: _Counts, usual: _Counts) -> _Counts:
    """By age: the share used there of what reached it. Who left within an age was there for half of it."""
    hazards, reached = [0.0] * len(used), 0.0
    for age in reversed(range(len(used))):
        exposed = reached + used[age] + 0.5 * left[age] + _DOUBT
        hazards[age] = (used[age] + _DOUBT * usual[age]) / exposed
        reached += used[age] + left[age]
    return hazards


def _index(hazards: _Counts) -> _Counts:
    """By age: uses per block and take, if kept from then on for as long as pays best."""
    return [_best_rate(hazards, age) for age in range(len(hazards))]


def _best_rate(hazards: _Counts, start: int) -> float:
    kept, uses, room, best = 1.0, 0.0, 0.0, 0.0
    for age in range(start, len(hazards)):
        hazard = hazards[age]
        uses += kept * hazard
        room += kept * (1 << age) * 0.5 * (1.0 - 0.5 * hazard)
        kept *= 1.0 - hazard
        best = max(best, uses / room)
    return best
