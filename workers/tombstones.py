"""Cancels that overtook what they cancel. Bounded: the oldest are forgotten."""

from __future__ import annotations

from collections import OrderedDict

from diptych.types import RequestId

_KEPT = 4096


class Tombstones:
    """(request, attempt) that must not start any more."""

    def __init__(self) -> None:
        self._keys: OrderedDict[tuple[RequestId, int], None] = OrderedDict()

    def add(self, request: RequestId, attempt: int) -> None:
        self._keys[request, attempt] = None
        while len(self._keys) > _KEPT:
            self._keys.popitem(last=False)

    def __contains__(self, key: tuple[RequestId, int]) -> bool:
        return key in self._keys
