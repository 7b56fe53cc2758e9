"""The effects of roles, on the event loop: calls to peers, bounded, with answers brought back.

Knows neither Ray (peers are objects with async methods) nor what the calls mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from diptych.errors import Internal, ServingError, WorkerLost
from diptych.types import FrontId, Outgoing, WorkerId
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
        self._closed = False

    # ---- the event loop's side ----------------------------------------------------------------------

    def meet(self, peers: dict[WorkerId, Peer]) -> set[WorkerId]:
        """These are all the others. Returns who was one before and is none now."""
        left = self._peers.keys() - peers.keys()
        self._peers = dict(peers)
        return left

    def close(self) -> None:
        """Whatever is under way ends unanswered, and nothing new begins."""
        self._closed = True
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

    def wait(
        self,
        peer: WorkerId,
        what: Callable[[Peer], Awaitable[T]],
        is_pending: Callable[[Peer], Awaitable[bool]],
        then: Callable[[T | ServingError], None],
    ) -> None:
        self._loop.call_soon_threadsafe(self._spawn, self._long(peer, what, is_pending, then))

    def now(self) -> float:
        return time.monotonic()

    # ---- inside -----------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _short(
        self, peer: WorkerId, what: Callable[[Peer], Awaitable[T]], then: Callable[[T | ServingError], None] | None
    ) -> None:
        answer = await self._bounded(peer, what, self._lease_seconds)
        if then:
            self._post(then, answer)

    async def _bounded(
        self, peer: WorkerId, what: Callable[[Peer], Awaitable[T]], timeout_seconds: float
    ) -> T | ServingError:
        known = self._peers.get(peer)
        if known is None:
            return WorkerLost(f"{peer} is not a member of this cluster any more")
        try:
            return await asyncio.wait_for(what(known), timeout_seconds)
        except TimeoutError:
            return WorkerLost(f"{peer} did not answer within {timeout_seconds} s")
        except ServingError as error:
            return error
        except Exception as error:  # a bug, there or here: the engine waits for an answer all the same
            return Internal(f"{peer}: {error!r}")

    async def _long(
        self,
        peer: WorkerId,
        what: Callable[[Peer], Awaitable[T]],
        is_pending: Callable[[Peer], Awaitable[bool]],
        then: Callable[[T | ServingError], None],
    ) -> None:
        """Wait as long as the peer says that it knows the call and its engine moves."""
        self._post(then, await self._answer_of(peer, what, is_pending))

    async def _answer_of(
        self, peer: WorkerId, what: Callable[[Peer], Awaitable[T]], is_pending: Callable[[Peer], Awaitable[bool]]
    ) -> T | ServingError:
        known = self._peers.get(peer)
        if known is None:
            return WorkerLost(f"{peer} is not a member of this cluster any more")
        call = asyncio.ensure_future(what(known))
        try:
            while (doubt := await self._doubt(peer, call, is_pending)) is None and not call.done():
                pass
            if doubt and not call.done():
                # The answer may be on its way: it was sent before the peer forgot the call.
                await asyncio.wait({call}, timeout=self._lease_seconds / 4)
            if not call.done():
                return WorkerLost(f"{peer} lost the call: {doubt}")
            return await call
        except ServingError as error:
            return error
        except Exception as error:  # a bug, there or here: the engine waits for an answer all the same
            return Internal(f"{peer}: {error!r}")
        finally:
            call.cancel()

    async def _doubt(
        self, peer: WorkerId, call: asyncio.Future[T], is_pending: Callable[[Peer], Awaitable[bool]]
    ) -> str | None:
        """After a quarter of a lease without an answer: why there may never be one. All in all within the lease."""
        await asyncio.wait({call}, timeout=self._lease_seconds / 4)
        if call.done():
            return None
        pending = await self._bounded(peer, is_pending, self._lease_seconds / 2)
        return None if pending is True else f"{pending or 'it does not know it, or its engine does not move'}"
