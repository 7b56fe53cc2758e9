"""One request's life seen from the front: place, submit, read, fence, turn into text, end.

Knows workers and the scheduler as objects with async methods; neither Ray nor HTTP nor gRPC.
Decode owns the request, the front owns the retry: an attempt that died goes on elsewhere, from the
prompt and what was said of the answer. What it takes is computed again or found in some cache, and
tokens depend on what is before them alone, so its client sees a pause and nothing else.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cluster.front.answer import Answer
from cluster.front.desk import Desk
from cluster.front.fallback import Own, place_alone
from cluster.front.inbox import Inbox
from cluster.front.life import Life
from cluster.front.outcomes import Outcomes, Watch
from cluster.front.patience import Patience
from cluster.front.scheduler_calls import SchedulerSilent
from cluster.front.service import Ask, Delta
from cluster.observe.spans import Spans
from cluster.scheduler.costs import RequestShape, Rule
from diptych.errors import DeadlineExceeded, Draining, NoWorker, Overloaded, ServingError, WorkerLost
from diptych.hashing import granule_hashes, tenant_root
from diptych.types import (
    BlockHash,
    Changed,
    ClusterStatus,
    Emission,
    Explanation,
    FrontId,
    Operation,
    Outcome,
    Outgoing,
    Placement,
    Request,
    RequestId,
    WorkerId,
    WorkerInfo,
)

if TYPE_CHECKING:
    from cluster.front.tokenizer import TextModel

_PAUSE_SECONDS = 0.25
_SILENCES = 2
"""Streams of a worker that end without a token, one after the other, until it is given up."""
_PATIENCES = 3
"""A stuck scheduler is noticed after twice the patience, and its successor is up in seconds."""
_STATUS_SECONDS = 0.5
"""A status this young is served again."""


class WorkerPort(Protocol):
    """What a front asks of a worker."""

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None: ...

    async def cancel(self, request: RequestId, attempt: int) -> None: ...

    async def owns(self, request: RequestId, attempt: int) -> bool: ...

    def outbox(self, front: FrontId) -> AsyncIterator[tuple[Outgoing, ...]]:
        """Begins with an empty word: what is submitted from now on will be heard. May end while the worker lives."""
        ...


class SchedulerPort(Protocol):
    """What a front asks of the scheduler."""

    async def place(self, shape: RequestShape) -> Placement:
        """When it is its turn. Raises SchedulerSilent when nobody answers."""
        ...

    async def withdraw(self, request: RequestId) -> None:
        """Nobody waits for its turn any more. Raises nothing."""
        ...

    async def status(self) -> ClusterStatus: ...

    async def finished(self, outcomes: tuple[Outcome, ...]) -> None: ...

    async def explain(self, request: str) -> tuple[Explanation, ...]: ...


@dataclass(slots=True)
class _Member:
    info: WorkerInfo
    port: WorkerPort
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it can be heard."""
    reader: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontIdentity:
    """Who this front is and what it serves."""

    id: FrontId
    model: str
    root: BlockHash
    """Block names of the cluster's model start from it."""
    patience_seconds: float
    """Silence after which a worker is asked whether it still has the request."""
    recovery_seconds: float
    """How long a request that lost its worker waits for another one."""
    how: Rule = "auto"
    """`placement.how`, for the time without a scheduler."""


class Dispatcher:
    """Implements `cluster.front.service.Service`. Lives on one event loop."""

    def __init__(
        self, identity: FrontIdentity, text: TextModel, scheduler: SchedulerPort, desk: Desk | None = None
    ) -> None:
        """`desk`: where the owner of the workers takes operations."""
        self._identity = identity
        self._text = text
        self._scheduler = scheduler
        self._desk = desk or Desk()
        self._outcomes = Outcomes(scheduler)
        self._spans = Spans()
        self._members: dict[WorkerId, _Member] = {}
        self._inboxes: dict[RequestId, Inbox] = {}
        self._placed_on: dict[RequestId, Placement] = {}
        self._contexts: dict[RequestId, int] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._status: tuple[float, ClusterStatus] | None = None
        self._patience = Patience()
        self._changed = asyncio.Event()
        """Set when the members changed, and then another one."""
        self._stopping = False

    # ---- members --------------------------------------------------------------------------------------

    async def meet(self, workers: Mapping[WorkerId, tuple[WorkerInfo, WorkerPort]]) -> None:
        """These are the workers now. Returns when all new ones can be heard."""
        for worker in [known for known in self._members if known not in workers]:
            self._forget(worker)
        for worker, (info, port) in workers.items():
            known = self._members.get(worker)
            if known and known.info.epoch == info.epoch:
                known.info = info  # its role may be another
                continue
            if known:
                self._forget(worker)
            member = self._members[worker] = _Member(info, port)
            member.reader = asyncio.ensure_future(self._read(worker, member))
            await asyncio.wait_for(member.opened.wait(), self._identity.patience_seconds)
        self._changed.set()
        self._changed = asyncio.Event()

    def fail_all(self) -> None:
        """Requests that still run hear that this front is going away."""
        self._stopping = True
        for request, inbox in self._inboxes.items():
            inbox.fail(Draining(f"{request} was cut off: the front that it came through is stopping"))

    async def close(self) -> None:
        """Cancels what is under way and stops listening."""
        self._stopping = True
        for worker in list(self._members):
            self._forget(worker)
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=self._identity.patience_seconds)
        self._outcomes.close()

    def _forget(self, worker: WorkerId) -> None:
        if reader := self._members.pop(worker).reader:
            reader.cancel()
        self._lost(worker)

    def _lost(self, worker: WorkerId) -> None:
        """Requests that it decodes end here; those it only prefills are decode's to save."""
        for request, placement in self._placed_on.items():
            if placement.decode == worker:
                self._inboxes[request].fail(WorkerLost(f"{worker} was lost while it answered {request}"))

    async def _read(self, worker: WorkerId, member: _Member) -> None:
        with suppress(ServingError):
            silences = 0
            while silences < _SILENCES:  # a line may be cut while its worker lives
                silences += 1
                async for items in member.port.outbox(self._identity.id):
                    member.opened.set()
                    for item in items:
                        silences = 0
                        if inbox := self._inboxes.get(item.request):
                            inbox.put(item)
                member.opened.clear()
                self._lost(worker)
        # A worker that isn't heard can't be asked: who is placed there would wait for ever.
        self._members.pop(worker).opened.set()
        self._lost(worker)

    # ---- Service ----------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        return self._identity.model

    @property
    def text(self) -> TextModel:
        return self._text

    @property
    def max_context(self) -> int:
        return min((member.info.max_context for member in self._members.values()), default=0)

    @property
    def ready(self) -> bool:
        return any(member.info.role != "prefill" and member.opened.is_set() for member in self._members.values())

    async def status(self) -> ClusterStatus:
        now = time.monotonic()
        if self._status is None or now - self._status[0] > _STATUS_SECONDS:
            self._status = (now, await self._scheduler.status())
        return self._status[1]

    async def change(self, operation: Operation) -> Changed:
        return await self._desk.perform(operation)

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        return await self._scheduler.explain(request)

    async def generate(self, ask: Ask) -> AsyncGenerator[Delta, None]:
        root = tenant_root(self._identity.root, ask.tenant)
        request = Request(
            id=_own_id(ask.id),
            front=self._identity.id,
            tokens=ask.tokens,
            granules=granule_hashes(ask.tokens, root),
            root=root,
            params=ask.params,
            choice=ask.choice,
            priority=ask.priority,
            arrived=time.time(),
        )
        life = Life(ask, request, Inbox(self._patience), Watch(request.id))
        self._inboxes[request.id] = life.inbox
        answer = Answer(ask, self._text)
        finished, error = False, "cancelled"
        try:
            await self._submit(life)
            while not finished:
                emissions = await self._next(life)
                life.watch.heard(emissions)
                delta = answer.take(emissions)
                if finished := delta.finish is not None:
                    error = ""
                if delta.tokens or finished:
                    yield delta
        except ServingError as ended:
            error = type(ended).__name__
            raise
        finally:
            placement = self._placed_on.pop(request.id, None)
            self._contexts.pop(request.id, None)
            self._outcomes.add(outcome := life.watch.outcome(error))
            self._spans.tell(outcome, placement, request.arrived)
            del self._inboxes[request.id]
            # An answer that ended by itself is over at the worker too; a stop string is only known here.
            if placement and not answer.ended_by_worker:
                self._cancel(placement, request.id, life.inbox.attempt)

    # ---- an attempt ---------------------------------------------------------------------------------------

    async def _submit(self, life: Life) -> None:
        inbox = life.inbox
        while True:
            request = life.continued()
            placement = await self._place(life, request)
            member = await self._heard(placement.decode)
            if member is None:
                await self._pause(life, WorkerLost(f"{placement.decode} is gone"))
                continue
            self._placed_on[request.id] = placement
            if placement.priority is not None:
                request = replace(request, priority=placement.priority)
            try:
                await member.port.submit(request, inbox.attempt, placement)
            except (WorkerLost, Draining) as error:
                if inbox.spoke:
                    return  # only its word that it has the request was lost
                self._again(life, error)
                if isinstance(error, Draining):  # it may be placed there until all know
                    await self._pause(life, error)
            else:
                return

    async def _place(self, life: Life, request: Request) -> Placement:
        """Raises Overloaded for a new request; one that was placed before waits for a worker to come back.

        So does a new one for a while, where those who decode are only late with their reports.
        """
        while True:
            try:
                placement = await self._turn(_shape(life.ask, request))
            except Overloaded as error:
                if life.losses:
                    await self._pause(life, error)
                elif isinstance(error, NoWorker) and self.ready:
                    await self._pause(life, error, _PATIENCES * self._identity.patience_seconds)
                else:
                    raise
            else:
                life.watch.placed()
                return placement

    async def _pause(self, life: Life, error: ServingError, most_seconds: float | None = None) -> None:
        """Until the workers change, or a moment. Raises `error` when that has gone on for too long."""
        now = asyncio.get_running_loop().time()
        seconds = self._identity.recovery_seconds if most_seconds is None else most_seconds
        life.wait(now, now + seconds, error)
        with suppress(TimeoutError):
            await self._patience.wait(self._changed.wait(), _PAUSE_SECONDS)

    async def _heard(self, worker: WorkerId) -> _Member | None:
        """None when it is gone. A line that was cut may be mended in a moment."""
        member = self._members.get(worker)
        if member:
            with suppress(TimeoutError):
                await self._patience.wait(member.opened.wait(), self._identity.patience_seconds)
        if member is None or self._members.get(worker) is not member or not member.opened.is_set():
            return None
        return member

    async def _turn(self, shape: RequestShape) -> Placement:
        """By the scheduler, when it is its turn; without one by this front's own rule, as far as that has room."""
        self._contexts[shape.request] = shape.context
        give_up = time.monotonic() + _PATIENCES * self._identity.patience_seconds
        while True:
            try:
                return await self._scheduler.place(shape)
            except SchedulerSilent:
                if placement := self._place_alone(shape):
                    self._withdraw(shape.request)
                    return placement
                if time.monotonic() > give_up:
                    raise
            except asyncio.CancelledError:
                self._withdraw(shape.request)
                raise

    def _place_alone(self, shape: RequestShape) -> Placement | None:
        workers = [member.info for member in self._members.values() if member.opened.is_set()]
        own = [Own(placement, self._contexts[one]) for one, placement in self._placed_on.items()]
        return place_alone(shape, workers, own, self._identity.how)

    async def _next(self, life: Life) -> list[Emission]:
        while True:
            try:
                return await life.inbox.wait_next(self._identity.patience_seconds)
            except TimeoutError:
                await self._check_alive(life)
            except (WorkerLost, Draining) as error:
                if self._stopping:
                    raise
                self._again(life, error)
                await self._submit(life)

    async def _check_alive(self, life: Life) -> None:
        """Nothing was heard for long: a queue is no reason to give up, a silent worker is."""
        request, inbox = life.request.id, life.inbox
        decode = self._placed_on[request].decode
        member, owned = self._members.get(decode), False
        with suppress(TimeoutError, ServingError):
            if member:
                async with asyncio.timeout(self._identity.patience_seconds):
                    owned = await member.port.owns(request, inbox.attempt)
        if not owned:
            inbox.fail(WorkerLost(f"{decode} fell silent while it answered {request}"))

    def _again(self, life: Life, error: ServingError) -> None:
        """Raises `error` when it was the last attempt."""
        life.lost(error)
        if placement := self._placed_on.pop(life.request.id, None):
            self._cancel(placement, life.request.id, life.inbox.attempt)
        life.inbox.restart()

    def _cancel(self, placement: Placement, request: RequestId, attempt: int) -> None:
        member = self._members.get(placement.decode)
        if member is None:
            return

        async def cancel() -> None:
            with suppress(ServingError):
                await member.port.cancel(request, attempt)

        self._beside(cancel())

    def _withdraw(self, request: RequestId) -> None:
        self._beside(self._scheduler.withdraw(request))

    def _beside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)


def _shape(ask: Ask, request: Request) -> RequestShape:
    """What placement needs to know of it, now: a deadline is nearer on each attempt."""
    deadline = ask.deadline_seconds
    if deadline is not None:
        deadline -= time.time() - request.arrived
        if deadline <= 0:
            raise DeadlineExceeded("the request's own deadline passed")
    return RequestShape(
        request=request.id,
        granules=request.granules,
        prompt_tokens=len(request.tokens),
        max_tokens=request.params.max_tokens - request.said,
        priority=request.priority,
        tenant=ask.tenant,
        ttft_seconds=ask.ttft_seconds,
        itl_seconds=ask.itl_seconds,
        deadline_seconds=deadline,
    )


def _own_id(id: RequestId) -> RequestId:  # noqa: A002
    """What workers call it. A caller may give an id again while they still speak for, or cancel, the one before."""
    return RequestId(f"{id}~{secrets.token_hex(4)}")
