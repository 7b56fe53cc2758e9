"""Prefixes that will soon be cached where a request was just placed. Knows names and bits, not workers or truth.

Without them a burst of prompts with one prefix, between a placement and the report that tells of its
blocks, would count as many misses. A promise is a guess: it fades after a while, whether kept or not, and
what it says is rounded down to depths with three significant bits (1-8, 10, 12, 14, 16, 20, ... granules)
and to whole prompts, so that a promise of a thousand granules costs thirty entries.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diptych.types import BlockHash

_MOST_ENTRIES = 1 << 18
"""Of one generation: what promises may cost in memory, however long the queues are."""


class Promises:
    """Two generations, each as long as its longest promise: the older one is dropped whole."""

    def __init__(self) -> None:
        self._young: dict[BlockHash, int] = {}
        self._old: dict[BlockHash, int] = {}
        self._began = 0.0
        """When the younger generation did."""
        self._made_seconds = 0.0
        """The longest life promised in it."""
        self._kept_seconds = 0.0
        """The longest in the older one, which stays as long once more."""

    def __len__(self) -> int:
        """Names, of both generations."""
        return len(self._young) + len(self._old)

    def make(self, granules: Sequence[BlockHash], holders: int, at: float, until: float) -> None:
        """The holders will have this prompt; nobody should count on it after `until`."""
        self._fade(at)
        if not self._young:
            self._began = at
        if len(self._young) >= _MOST_ENTRIES:
            self._turn(at)
        self._made_seconds = max(self._made_seconds, until - at)
        young = self._young
        names = [granules[depth - 1] for depth in _depths(len(granules))]
        young.update(zip(names, map(int.__or__, map(young.get, names, repeat(0)), repeat(holders)), strict=True))

    def depths(self, granules: Sequence[BlockHash], at: float) -> list[tuple[int, int]]:
        """(leading granules, who was promised exactly so many), deepest first."""
        self._fade(at)
        if not self._young and not self._old:
            return []
        # Who was promised a depth was promised all before it.
        if not granules or not (self._young.get(granules[0], 0) | self._old.get(granules[0], 0)):
            return []
        found: list[tuple[int, int]] = []
        seen = 0
        for depth in reversed(_depths(len(granules))):
            name = granules[depth - 1]
            if fresh := (self._young.get(name, 0) | self._old.get(name, 0)) & ~seen:
                found.append((depth, fresh))
                seen |= fresh
        return found

    def revoke(self, holders: int) -> None:
        """They lost all they had, or are gone."""
        for generation in (self._young, self._old):
            for name, promised in list(generation.items()):
                if promised & holders:
                    generation[name] = promised & ~holders

    def _fade(self, at: float) -> None:
        for _ in range(2):
            life_seconds = max(self._made_seconds, self._kept_seconds)
            if at - self._began >= life_seconds and (self._young or self._old):
                self._turn(self._began + life_seconds)

    def _turn(self, at: float) -> None:
        self._old, self._young = self._young, {}
        self._began, self._kept_seconds, self._made_seconds = at, self._made_seconds, 0.0


@lru_cache(maxsize=4096)
def _depths(count: int) -> tuple[int, ...]:
    """Of a prompt of so many granules, rising."""
    depths = list(range(1, min(count, 8) + 1))
    step = 2
    while depths and depths[-1] + step <= count:
        depths.append(depths[-1] + step)
        step = max(2, 1 << (depths[-1].bit_length() - 3))
    return tuple(depths if not depths or depths[-1] == count else [*depths, count])
