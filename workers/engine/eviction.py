"""The order in which unused blocks lose their content. Knows ids and ages, not names or owners."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.types import BlockId


class EvictionOrder:
    """Least recently used first; whoever pushes a chain pushes its leaf first.

    A chain is only ever used from its root, so a leaf is never younger than its parent and
    plain recency is leaf-first: no block outlives the one it hangs from.
    """

    def __init__(self) -> None:
        # An OrderedDict and not a dict: taking the first key of a dict that lost many is O(n).
        self._order: OrderedDict[BlockId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._order

    def __iter__(self) -> Iterator[BlockId]:
        """The next to lose its content first."""
        return iter(self._order)

    def push(self, block: BlockId) -> None:
        """Just used: last in line."""
        assert block not in self._order, f"block {block} waits for eviction twice"
        self._order[block] = None

    def remove(self, block: BlockId) -> None:
        """In use again."""
        del self._order[block]

    def pop(self) -> BlockId:
        """The one unused for longest."""
        return self._order.popitem(last=False)[0]
