"""Keys in the order of their ranks, any of which may leave or change its rank. Knows no request."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Generic, NamedTuple, TypeVar

K = TypeVar("K")
_SLACK = 64
"""Dead entries that are no reason to tidy up."""


class _Entry(NamedTuple):
    rank: tuple[float, ...]
    turn: int
    """Equal ranks: first come, first served."""
    key: Any


class Ranked(Generic[K]):
    """A heap with lazy deletion: every change is O(log n), amortised, and memory follows the living keys."""

    def __init__(self) -> None:
        self._living: dict[K, _Entry] = {}
        self._heap: list[_Entry] = []
        self._turn = 0

    def __len__(self) -> int:
        return len(self._living)

    def __contains__(self, key: K) -> bool:
        return key in self._living

    def __iter__(self) -> Iterator[K]:
        """In no order."""
        return iter(self._living)

    def put(self, key: K, *rank: float) -> None:
        """In, or to another place."""
        self._turn += 1
        entry = self._living[key] = _Entry(rank, self._turn, key)
        heappush(self._heap, entry)
        self._tidy()

    def discard(self, key: K) -> None:
        """Out, if it is in."""
        self._living.pop(key, None)
        self._tidy()

    def first(self) -> K | None:
        """The key of the least rank."""
        entry = self._first()
        return None if entry is None else entry.key

    def least(self) -> tuple[float, ...] | None:
        """The rank of `first`."""
        entry = self._first()
        return None if entry is None else entry.rank

    def check(self) -> None:
        """Every living key can be found, and the dead don't pile up."""
        found = {id(entry) for entry in self._heap}
        assert all(id(entry) in found for entry in self._living.values()), "a key can't be found"
        assert len(self._heap) <= 2 * len(self._living) + _SLACK + 1, "dead entries pile up"

    def _first(self) -> _Entry | None:
        heap = self._heap
        while heap and self._living.get(heap[0].key) is not heap[0]:
            heappop(heap)
        return heap[0] if heap else None

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._living) + _SLACK:
            self._heap = list(self._living.values())
            heapify(self._heap)
