"""Where operations wait until the owner of the workers has done them. Knows neither, only who asks and who answers.

Fronts hear what operators want; the owner (`cluster.pools`) is a process that nobody can call. So it
listens to every front, as it does for their logs, and each operation is answered by its number.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

from diptych.errors import DeadlineExceeded, Draining

if TYPE_CHECKING:
    from diptych.errors import ServingError
    from diptych.types import Changed, Operation

PATIENCE_SECONDS: Final = 900.0
"""Loading a large model takes minutes, and a drain as long as its answers; forever it may not take."""


class Desk:
    """Of one front. Lives on its event loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._wanted: asyncio.Queue[tuple[int, Operation] | None] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[Changed]] = {}

    async def perform(self, operation: Operation) -> Changed:
        """When it is done. Raises what the owner says against it."""
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._wanted.put_nowait((number, operation))
        try:
            return await asyncio.wait_for(future, PATIENCE_SECONDS)
        except TimeoutError:
            raise DeadlineExceeded(f"not done within {PATIENCE_SECONDS:g} s; it may be done later") from None
        finally:
            del self._waiting[number]

    async def operations(self) -> AsyncGenerator[tuple[int, Operation], None]:
        """What is wanted, as it comes, until the desk closes."""
        while (wanted := await self._wanted.get()) is not None:
            yield wanted

    def settle(self, number: int, outcome: Changed | ServingError) -> None:
        """The owner's answer. Nobody may wait for it any more."""
        future = self._waiting.get(number)
        if future is None or future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def close(self) -> None:
        """Who waits hears that this front is going away."""
        self._wanted.put_nowait(None)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Draining("the front that this was asked of is stopping"))
