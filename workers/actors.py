"""Thin Ray shells around workers: nothing here decides anything.

`cluster` imports this module and nothing else of ours below it, so torch loads in the actor's
process and not in the driver's. Ray never retries or restarts: that belongs to `cluster.pools`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray.exceptions import PendingCallsLimitExceeded, RayActorError, RayError, RayTaskError

from diptych.errors import Internal, Overloaded, ServingError, WorkerLost
from diptych.packing import packed_steps
from diptych.types import (
    BlockHash,
    FrontId,
    KvOffer,
    KvParcel,
    KvTicket,
    Placement,
    PrefillDone,
    PrefillOrder,
    Report,
    Request,
    RequestId,
    TransferId,
    WorkerId,
    WorkerInfo,
    WorkerSpec,
)

if TYPE_CHECKING:
    from workers.worker import Worker

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., object])
CONTROL = "control"
"""The concurrency group (its own event loop and thread) of what must answer while work goes on."""


def _control(method: Method) -> Method:
    return ray.method(concurrency_group=CONTROL)(method)  # pyright: ignore


async def answer(what: Awaitable[T], who: str) -> T:
    """The answer of a remote call, with every failure as one of ours.

    A dead or unreachable actor is WorkerLost; an error we raised there is raised here as it was;
    anything else is Internal and names itself.
    """
    try:
        return await what
    except RayTaskError as error:
        cause = cast("BaseException", error.cause)  # pyright: ignore[reportUnknownMemberType]
        if isinstance(cause, ServingError):
            raise cause from None
        raise Internal(f"{who}: {cause!r}") from error
    except PendingCallsLimitExceeded as error:
        raise Overloaded(f"{who} has too many calls waiting") from error
    except RayActorError as error:
        raise WorkerLost(f"{who} died") from error
    except RayError as error:
        raise WorkerLost(f"{who} can't be reached: {error}") from error


async def _remote(method: Any, *arguments: object) -> Any:  # noqa: ANN401 (handles are untyped)
    """A call that is refused when it is sent fails like one that is refused there."""
    return await method.remote(*arguments)


class RayPeer:
    """Another worker, through its handle (workers.peers.Peer)."""

    def __init__(self, worker: WorkerId, handle: Any) -> None:  # noqa: ANN401 (handles are untyped)
        self._who = str(worker)
        self._handle = handle

    async def offer(self) -> KvOffer:
        return await answer(_remote(self._handle.offer), self._who)

    async def run(self, order: PrefillOrder) -> PrefillDone:
        return await answer(_remote(self._handle.run, order), self._who)

    async def is_pending(self, request: RequestId, attempt: int) -> bool:
        return await answer(_remote(self._handle.is_pending, request, attempt), self._who)

    async def committed(self, transfer: TransferId) -> None:
        await answer(_remote(self._handle.committed, transfer), self._who)

    async def withdraw(self, request: RequestId, attempt: int) -> None:
        await answer(_remote(self._handle.withdraw, request, attempt), self._who)

    async def grant(self, request: RequestId, attempt: int) -> KvTicket | None:
        return await answer(_remote(self._handle.grant, request, attempt), self._who)

    async def is_granting(self, request: RequestId, attempt: int) -> bool:
        return await answer(_remote(self._handle.is_granting, request, attempt), self._who)

    async def expect(self, sender: WorkerId, parcel: KvParcel) -> None:
        await answer(_remote(self._handle.expect, sender, parcel), self._who)

    async def lend(self, ticket: KvTicket, names: tuple[BlockHash, ...]) -> int:
        return await answer(_remote(self._handle.lend, ticket, names), self._who)

    async def returned(self, transfer: TransferId) -> None:
        await answer(_remote(self._handle.returned, transfer), self._who)

    async def transfer_failed(self, request: RequestId, attempt: int, reason: str) -> None:
        await answer(_remote(self._handle.transfer_failed, request, attempt, reason), self._who)


class WorkerActor:
    """One worker in a process of its own."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: Worker | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> WorkerInfo:
        """Load torch and the model."""
        from workers.worker import Worker

        if not self._spec.host:
            self._spec = replace(self._spec, host=str(ray.util.get_node_ip_address()))  # pyright: ignore
        self._worker = Worker(self._spec)
        self._watch = asyncio.ensure_future(self._exit_when_broken(self._worker))
        info = await self._worker.start()
        return replace(info, node=ray.get_runtime_context().get_node_id())

    async def _exit_when_broken(self, worker: Worker) -> None:
        """A worker without an engine is of no use: its process ends, which is what pools watch."""
        traceback.print_exception(await worker.wait_broken())
        sys.stderr.flush()
        os._exit(1)

    async def meet(self, peers: Mapping[WorkerId, Any]) -> None:
        """Handles of all other workers."""
        await self._it.meet({worker: RayPeer(worker, handle) for worker, handle in peers.items()})

    async def report_to(self, scheduler: Any) -> None:  # noqa: ANN401
        """The scheduler's handle."""

        async def report(report: Report) -> bool:
            return await answer(_remote(scheduler.report, report), "the scheduler")

        self._it.report_to(report)

    async def drain(self, timeout_seconds: float) -> int:
        """How many answers went elsewhere."""
        return await self._it.drain(timeout_seconds)

    async def stop(self, timeout_seconds: float) -> bool:
        """Before the process is ended: streams, links and the engine."""
        return await self._it.stop(timeout_seconds) if self._worker else True

    @_control
    async def wait_dead(self) -> None:
        """Never returns: the call fails when the process dies."""
        await asyncio.Event().wait()

    @_control
    async def pid(self) -> int:
        """At any time, while it loads its model too: who doesn't answer is frozen, or has not been let run for long."""
        return os.getpid()

    @_control
    async def silent_seconds(self) -> float:
        """How long the engine has not come round while it had work."""
        return self._it.silent_seconds()

    # ---- fronts --------------------------------------------------------------------------------------

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None:
        await self._it.submit(request, attempt, placement)

    async def cancel(self, request: RequestId, attempt: int) -> None:
        await self._it.cancel(request, attempt)

    async def outbox(self, front: FrontId) -> AsyncGenerator[bytes, None]:
        """For `diptych.packing.unpacked`."""
        async for step in packed_steps(self._it.outbox(front)):
            yield step

    async def token_line(self) -> str:
        """HOST:PORT of the straight way for what `outbox` tells: without Ray's cost for each item."""
        return self._it.token_line

    async def front_left(self, front: FrontId) -> None:
        self._it.front_left(front)

    @_control
    async def owns(self, request: RequestId, attempt: int) -> bool:
        return self._it.owns(request, attempt)

    # ---- peers ---------------------------------------------------------------------------------------

    async def offer(self) -> KvOffer:
        return await self._it.offer()

    async def run(self, order: PrefillOrder) -> PrefillDone:
        return await self._it.run(order)

    @_control
    async def is_pending(self, request: RequestId, attempt: int) -> bool:
        return await self._it.is_pending(request, attempt)

    async def committed(self, transfer: TransferId) -> None:
        await self._it.committed(transfer)

    async def withdraw(self, request: RequestId, attempt: int) -> None:
        await self._it.withdraw(request, attempt)

    async def grant(self, request: RequestId, attempt: int) -> KvTicket | None:
        return await self._it.grant(request, attempt)

    @_control
    async def is_granting(self, request: RequestId, attempt: int) -> bool:
        return await self._it.is_granting(request, attempt)

    async def expect(self, sender: WorkerId, parcel: KvParcel) -> None:
        await self._it.expect(sender, parcel)

    async def lend(self, ticket: KvTicket, names: tuple[BlockHash, ...]) -> int:
        return await self._it.lend(ticket, names)

    async def returned(self, transfer: TransferId) -> None:
        await self._it.returned(transfer)

    async def transfer_failed(self, request: RequestId, attempt: int, reason: str) -> None:
        await self._it.transfer_failed(request, attempt, reason)

    @property
    def _it(self) -> Worker:
        if self._worker is None:
            raise WorkerLost(f"{self._spec.id} has not started")
        return self._worker
