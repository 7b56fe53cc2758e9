"""What one engine step says to a front, as bytes. Knows the types that cross, not how they cross.

Ray pickles with a Python function for each object that is not built in, and its streams unpickle each
item twice; bytes it copies. A step of 32 tokens is packed in 10 µs instead of 75, and unpacked in as much.
"""

from __future__ import annotations

import pickle
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from diptych.types import Emission, Failure

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from diptych.types import Outgoing


def packed(items: Sequence[Outgoing]) -> bytes:
    """Only for `unpacked`, of the same build."""
    rows = [tuple(item) if isinstance(item, Emission) else item for item in items]
    return pickle.dumps(rows, pickle.HIGHEST_PROTOCOL)


async def packed_steps(steps: AsyncGenerator[Sequence[Outgoing], None]) -> AsyncGenerator[bytes, None]:
    """Each of `steps` as it comes; ends it when it is ended."""
    async with aclosing(steps):
        async for items in steps:
            yield packed(items)


def unpacked(data: bytes) -> tuple[Outgoing, ...]:
    """Only what a process of the same cluster packed: unpickling runs what it is told to."""
    rows = cast("list[tuple[object, ...]]", pickle.loads(data))
    return tuple(row if isinstance(row, Failure) else Emission._make(row) for row in rows)
