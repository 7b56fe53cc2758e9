"""A pair of workers that hands over one request after another. Knows no fault."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diptych.types import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.workers.conftest import Token
    from tests.workers.crashes.conftest import Member, Society


@dataclass(eq=False)
class Steady:
    """Another pair of the surviving worker, at work all the time."""

    society: Society
    prefill: Member
    decode: Member
    make: Callable[[int], Request]
    answers: list[tuple[Request, list[Token]]] = field(default_factory=list)
    _ended: bool = False
    _working: asyncio.Task[None] | None = None

    async def work(self) -> None:
        while not self._ended:
            request = await self.society.submit(self.make(len(self.answers)), self.decode, self.prefill)
            said = await self.society.answer(request)
            if self.society.front.served(request.id).how != "remote":
                looks = await asyncio.gather(self.prefill.look(), self.decode.look())
                ends = [end for look in looks for end in look.ends if request.id in end]
                raise AssertionError(f"{self.prefill.id} to {self.decode.id}, {request.id} was not handed over: {ends}")
            self.answers.append((request, said))

    async def go_on(self, count: int) -> None:
        """So many answers more."""
        goal = len(self.answers) + count
        while len(self.answers) < goal:
            if self._working and self._working.done():
                self._working.result()  # raises what ended it
            await asyncio.sleep(0.01)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Every hand-off of it commits, or this raises."""
        self._working = asyncio.ensure_future(self.work())
        try:
            await self.go_on(1)
            yield
        finally:
            self._ended = True
            await self._working
