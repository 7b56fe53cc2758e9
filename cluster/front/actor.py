"""A front's process: both protocols over one dispatcher. A thin Ray shell; decides nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.front.desk import Desk
from cluster.front.scheduler_calls import SchedulerCalls
from diptych.errors import WorkerLost
from diptych.packing import unpacked
from diptych.token_line import listen
from workers.actors import answer

if TYPE_CHECKING:
    import grpc.aio

    from cluster.front.dispatcher import Dispatcher, FrontIdentity
    from cluster.front.http import HttpServer
    from cluster.journal import Entry, Level
    from cluster.observe.log_outlet import LogOutlet
    from diptych.errors import ServingError
    from diptych.types import (
        Changed,
        FrontId,
        ModelSource,
        Operation,
        Outgoing,
        Placement,
        Request,
        RequestId,
        WorkerId,
        WorkerInfo,
    )

_PATIENCES = 3
"""A stuck scheduler is noticed after twice the patience, and its successor is up in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSpec:
    """What a front is told at birth; picklable."""

    identity: FrontIdentity
    model: ModelSource
    http: str
    grpc: str
    log_level: Level
    log_prompts: bool
    grace_seconds: int
    """How long streams under way may go on when the front is told to stop."""
    secret: bytes
    """Of the cluster: workers and fronts know each other by it."""


class Ports(NamedTuple):
    """Where the front listens."""

    http: int
    grpc: int


_TOLD_SHARE = 0.7
"""Of the grace: what is left is for the last words to be written."""


class FrontActor:
    """One front."""

    def __init__(self, spec: FrontSpec) -> None:
        self._spec = spec
        self._dispatcher: Dispatcher | None = None
        self._scheduler: SchedulerCalls | None = None
        self._http: HttpServer | None = None
        self._grpc: grpc.aio.Server | None = None
        self._log: LogOutlet | None = None
        self._desk = Desk()

    async def prepare(self, scheduler: Any) -> int:  # noqa: ANN401 (handles are untyped)
        """Load the text side: in parallel with the workers' loading of weights. Its process."""
        from cluster.front.dispatcher import Dispatcher
        from cluster.front.tokenizer import TextModel
        from cluster.observe.log_outlet import LogOutlet

        self._log = LogOutlet(self._spec.identity.id, quotes=self._spec.log_prompts)
        self._log.install(self._spec.log_level)
        text = await asyncio.to_thread(TextModel.load, self._spec.model)
        self._scheduler = SchedulerCalls(scheduler, _PATIENCES * self._spec.identity.patience_seconds)
        self._dispatcher = Dispatcher(self._spec.identity, text, self._scheduler, self._desk)
        return os.getpid()

    async def log(self) -> AsyncGenerator[tuple[Entry, ...], None]:
        """What this front has to say, until it is closed."""
        assert self._log is not None, "prepare comes first"
        async for entries in self._log.batches():
            yield entries

    async def operations(self) -> AsyncGenerator[tuple[int, Operation], None]:
        """What operators want of the cluster's owner, until this front is closed."""
        async for wanted in self._desk.operations():
            yield wanted

    async def settle(self, number: int, outcome: Changed | ServingError) -> None:
        """The owner's answer to an operation."""
        self._desk.settle(number, outcome)

    async def use_scheduler(self, scheduler: Any) -> None:  # noqa: ANN401
        """The one before is dead; who waits for its answer asks this one."""
        assert self._scheduler is not None, "prepare comes first"
        self._scheduler.replace(scheduler)

    async def meet(self, workers: Mapping[WorkerId, tuple[WorkerInfo, Any]]) -> None:
        """All workers there are, with their handles."""
        secret = self._spec.secret
        ports = {worker: (info, _RayWorker(info, handle, secret)) for worker, (info, handle) in workers.items()}
        await self._it.meet(ports)

    async def open(self, *, beside: bool = False) -> Ports:
        """Listen. Raises OSError when an address is taken, unless it is `beside` one that is about to end."""
        from cluster.front.grpc_service import serve_grpc
        from cluster.front.http import serve_http
        from cluster.front.request_log import RequestLog
        from cluster.observe.metrics import FrontMetrics

        log = RequestLog(self._it.text if self._spec.log_prompts else None)
        metrics = FrontMetrics(self._it.model_name)
        service = metrics.observed(self._it)
        self._http = await serve_http(service, self._spec.http, metrics, log, beside=beside)
        self._grpc, grpc_port = await serve_grpc(service, self._spec.grpc, log, beside=beside)
        return Ports(self._http.port, grpc_port)

    async def close(self) -> None:
        """No new requests; running ones have a grace, then they are told, and who does not listen is cut off."""
        self._desk.close()
        await self._end(self._spec.grace_seconds)

    async def retire(self, grace_seconds: int) -> None:
        """As `close`, when there is a successor: operations that were asked for here go on, too."""
        await self._end(grace_seconds)
        self._desk.close()

    async def _end(self, grace_seconds: int) -> None:
        if self._dispatcher:
            asyncio.get_running_loop().call_later(_TOLD_SHARE * grace_seconds, self._dispatcher.fail_all)
        servers = [server for server in (self._grpc, self._http) if server]
        await asyncio.gather(*(server.stop(grace_seconds) for server in servers))
        if self._dispatcher:
            await self._dispatcher.close()
        if self._log:
            self._log.end()

    async def wait_dead(self) -> None:
        """Never returns: the call fails when the process dies."""
        await asyncio.Event().wait()

    @property
    def _it(self) -> Dispatcher:
        assert self._dispatcher is not None, "prepare comes first"
        return self._dispatcher


class _RayWorker:
    """cluster.front.dispatcher.WorkerPort over a handle."""

    def __init__(self, info: WorkerInfo, handle: Any, secret: bytes) -> None:  # noqa: ANN401
        self._who = str(info.id)
        self._handle = handle
        self._secret = secret
        self._straight = True

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None:
        await answer(self._handle.submit.remote(request, attempt, placement), self._who)

    async def cancel(self, request: RequestId, attempt: int) -> None:
        await answer(self._handle.cancel.remote(request, attempt), self._who)

    async def owns(self, request: RequestId, attempt: int) -> bool:
        return await answer(self._handle.owns.remote(request, attempt), self._who)

    async def outbox(self, front: FrontId) -> AsyncGenerator[tuple[Outgoing, ...], None]:
        """By the straight line if there is a way; where there is none, or after it was cut, by Ray."""
        straight, self._straight = self._straight, False
        if straight and (line := await self._line(front)):
            async with aclosing(line):
                async for step in line:
                    yield unpacked(step)
            return
        async for step in self._handle.outbox.remote(front):
            yield unpacked(await answer(step, self._who))

    async def _line(self, front: FrontId) -> AsyncGenerator[bytes, None] | None:
        address = await answer(self._handle.token_line.remote(), self._who)
        with suppress(WorkerLost):  # a firewall between pods, say
            return await listen(address, front, self._secret) if address else None
        return None
