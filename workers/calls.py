"""The effects of roles, on the event loop: calls to peers, bounded, with answers brought back.

Knows neither Ray (peers are objects with async methods) nor what the calls mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from diptych.errors import ServingError, WorkerLost
from diptych.types import FrontId, Outgoing, PrefillDone, PrefillOrder, WorkerId
from workers.peers import Peer

T = TypeVar("T")


class Calls:
    """Implements `workers.peers.Effects`. Made on the event loop, used from the engine's thread."""

    def __init__(self, post: Callable[..., None], lease_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._post = post
        self._lease_seconds = lease_seconds
        self._peers: dict[WorkerId, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._step: dict[FrontId, list[Outgoing]] = {}

    # ---- the event loop's side ----------------------------------------------------------------------

    def meet(self, peers: dict[WorkerId, Peer]) -> None:
        """These are all the others."""
        self._peers = dict(peers)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    # ---- the engine's side ----------------------------------------------------------------------------

    def take_step(self) -> dict[FrontId, list[Outgoing]]:
        """What was emitted since the last call."""
        step, self._step = self._step, {}
        return step

    def emit(self, front: FrontId, outgoing: Outgoing) -> None:
        self._step.setdefault(front, []).append(outgoing)

    def call(
        self,
        peer: WorkerId,
        what: Callable[[Peer], Awaitable[T]],
        then: Callable[[T | ServingError], None] | None = None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._spawn, self._short(peer, what, then))

    def order(self, peer: WorkerId, order: PrefillOrder, then: Callable[[PrefillDone | ServingError], None]) -> None:
        self._loop.call_soon_threadsafe(self._spawn, self._long(peer, order, then))

    def now(self) -> float:
        return time.monotonic()

    # ---- inside -----------------------------------------------------------------------------------------

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _short(
        self, peer: WorkerId, what: Callable[[Peer], Awaitable[T]], then: Callable[[T | ServingError], None] | None
    ) -> None:
        answer = await self._bounded(peer, what)
        if then:
            self._post(then, answer)

    async def _bounded(self, peer: WorkerId, what: Callable[[Peer], Awaitable[T]]) -> T | ServingError:
        known = self._peers.get(peer)
        if known is None:
            return WorkerLost(f"{peer} is not a member of this cluster any more")
        try:
            return await asyncio.wait_for(what(known), self._lease_seconds)
        except TimeoutError:
            return WorkerLost(f"{peer} did not answer within {self._lease_seconds} s")
        except ServingError as error:
            return error

    async def _long(
        self, peer: WorkerId, order: PrefillOrder, then: Callable[[PrefillDone | ServingError], None]
    ) -> None:
        """Wait as long as the peer says that it has the order and its engine moves."""
        known = self._peers.get(peer)
        if known is None:
            self._post(then, WorkerLost(f"{peer} is not a member of this cluster any more"))
            return
        run = asyncio.ensure_future(known.run(order))
        request, attempt = order.request.id, order.attempt
        while not run.done():
            await asyncio.wait({run}, timeout=self._lease_seconds / 2)
            if run.done():
                break
            pending = await self._bounded(peer, lambda known: known.is_pending(request, attempt))
            if pending is not True and not run.done():
                run.cancel()
                self._post(then, WorkerLost(f"{peer} lost the order: {pending or 'its engine does not move'}"))
                return
        error = run.exception()
        if error is None:
            self._post(then, run.result())
        elif isinstance(error, ServingError):
            self._post(then, error)
        else:
            raise error
