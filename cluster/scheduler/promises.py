"""Prefixes that will soon be cached where a request was just placed. Knows names and bits, not workers or truth.

Without them a burst of prompts with one prefix, between a placement and the report that tells of its
blocks, would count as many misses. A promise is a guess: it fades after a while, whether kept or not, and
what it says is rounded down to depths with two significant bits (1, 2, 3, 4, 6, 8, 12, 16, ... granules) and to
whole prompts, so that a promise of a thousand granules costs twenty entries.
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
        """(leading granules, who was promised exactly so many), in any order."""
        self._fade(at)
        if not self._young and not self._old:
            return []
        if not granules:
            return []
        # Who was promised a depth was promised all before it: where two depths agree, so do all between.
        depths = _depths(len(granules))
        found: list[tuple[int, int]] = []
        ends = [(0, self._holders(granules[0]), len(depths) - 1, self._holders(granules[-1]))]
        if deepest := ends[0][3]:
            found.append((depths[-1], deepest))
        while ends:
            low, more, high, fewer = ends.pop()
            if not more & ~fewer:
                continue
            if high - low == 1:
                found.append((depths[low], more & ~fewer))
                continue
            middle = (low + high) // 2
            there = self._holders(granules[depths[middle] - 1])
            ends += (low, more, middle, there), (middle, there, high, fewer)
        return found

    def _holders(self, name: BlockHash) -> int:
        return self._young.get(name, 0) | self._old.get(name, 0)

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
    powers = [1 << power for power in range(count.bit_length())]
    return tuple(
        sorted({depth for power in powers for depth in (power, power + power // 2) if depth <= count} | {count} - {0})
    )
