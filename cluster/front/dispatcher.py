"""One request's life seen from the front: place, submit, read, fence, turn into text, end.

Knows workers and the scheduler as objects with async methods; neither Ray nor HTTP nor gRPC.
Decode owns the request, the front owns the retry: an attempt that died before its client saw a
token is placed again; later ones end in an error that says so.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cluster.front.inbox import Inbox
from cluster.front.outcomes import Outcomes, Watch
from cluster.front.patience import Patience
from cluster.front.service import Ask, Delta, Usage
from cluster.front.stop_strings import StopStrings
from cluster.scheduler.costs import RequestShape
from diptych.errors import Draining, ServingError, WorkerLost
from diptych.hashing import granule_hashes, tenant_root
from diptych.types import (
    BlockHash,
    ClusterStatus,
    Emission,
    Explanation,
    Finish,
    FrontId,
    Outcome,
    Outgoing,
    Placement,
    Request,
    RequestId,
    Served,
    TokenLogprobs,
    WorkerId,
    WorkerInfo,
)

if TYPE_CHECKING:
    from cluster.front.tokenizer import TextModel

_ATTEMPTS = 3
_SILENCES = 2
"""Streams of a worker that end without a token, one after the other, until it is given up."""
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

    async def place(self, shape: RequestShape) -> Placement: ...

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


class Dispatcher:
    """Implements `cluster.front.service.Service`. Lives on one event loop."""

    def __init__(self, identity: FrontIdentity, text: TextModel, scheduler: SchedulerPort) -> None:
        self._identity = identity
        self._text = text
        self._scheduler = scheduler
        self._outcomes = Outcomes(scheduler)
        self._members: dict[WorkerId, _Member] = {}
        self._inboxes: dict[RequestId, Inbox] = {}
        self._placed_on: dict[RequestId, Placement] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._status: tuple[float, ClusterStatus] | None = None
        self._patience = Patience()

    # ---- members --------------------------------------------------------------------------------------

    async def meet(self, workers: Mapping[WorkerId, tuple[WorkerInfo, WorkerPort]]) -> None:
        """These are the workers now. Returns when all new ones can be heard."""
        for worker in [known for known in self._members if known not in workers]:
            self._forget(worker)
        for worker, (info, port) in workers.items():
            known = self._members.get(worker)
            if known and known.info.epoch == info.epoch:
                continue
            if known:
                self._forget(worker)
            member = self._members[worker] = _Member(info, port)
            member.reader = asyncio.ensure_future(self._read(worker, member))
            await asyncio.wait_for(member.opened.wait(), self._identity.patience_seconds)

    def fail_all(self) -> None:
        """Requests that still run hear that this front is going away."""
        for request, inbox in self._inboxes.items():
            inbox.fail(Draining(f"{request} was cut off: the front that it came through is stopping"))

    async def close(self) -> None:
        """Cancels what is under way and stops listening."""
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
        inbox = self._inboxes[request.id] = Inbox(self._patience)
        answer = _Answer(ask, self._text)
        finished, watch, error = False, Watch(request.id), "cancelled"
        try:
            await self._submit(request, inbox, watch)
            while not finished:
                emissions = await self._next(request, inbox, watch)
                watch.heard(emissions)
                delta = answer.take(emissions)
                if finished := delta.finish is not None:
                    error = ""
                if delta.tokens or finished:
                    yield delta
        except ServingError as ended:
            error = type(ended).__name__
            raise
        finally:
            self._outcomes.add(watch.outcome(error))
            placement = self._placed_on.pop(request.id, None)
            del self._inboxes[request.id]
            # An answer that ended by itself is over at the worker too; a stop string is only known here.
            if placement and not answer.ended_by_worker:
                self._cancel(placement, request.id, inbox.attempt)

    # ---- an attempt ---------------------------------------------------------------------------------------

    async def _submit(self, request: Request, inbox: Inbox, watch: Watch) -> None:
        shape = RequestShape(
            request=request.id,
            granules=request.granules,
            prompt_tokens=len(request.tokens),
            max_tokens=request.params.max_tokens,
        )
        while True:
            placement = await self._scheduler.place(shape)
            watch.placed()
            try:
                member = await self._heard(placement.decode)
                self._placed_on[request.id] = placement
                await member.port.submit(request, inbox.attempt, placement)
            except WorkerLost:
                if inbox.accepted:
                    return  # it speaks: only its word that it has the request was lost
                self._again(inbox, request)
            else:
                return

    async def _heard(self, worker: WorkerId) -> _Member:
        """Raises WorkerLost when it is gone. A line that was cut may be mended in a moment."""
        member = self._members.get(worker)
        if member:
            with suppress(TimeoutError):
                await self._patience.wait(member.opened.wait(), self._identity.patience_seconds)
        if member is None or self._members.get(worker) is not member or not member.opened.is_set():
            raise WorkerLost(f"{worker} is gone")
        return member

    async def _next(self, request: Request, inbox: Inbox, watch: Watch) -> list[Emission]:
        while True:
            try:
                return await inbox.wait_next(self._identity.patience_seconds)
            except TimeoutError:
                await self._check_alive(request, inbox)
            except WorkerLost:
                self._again(inbox, request)
                await self._submit(request, inbox, watch)

    async def _check_alive(self, request: Request, inbox: Inbox) -> None:
        """Nothing was heard for long: a queue is no reason to give up, a silent worker is."""
        decode = self._placed_on[request.id].decode
        member, owned = self._members.get(decode), False
        with suppress(TimeoutError, ServingError):
            if member:
                async with asyncio.timeout(self._identity.patience_seconds):
                    owned = await member.port.owns(request.id, inbox.attempt)
        if not owned:
            inbox.fail(WorkerLost(f"{decode} fell silent while it answered {request.id}"))

    def _again(self, inbox: Inbox, request: Request) -> None:
        """Raises the error under way unless another attempt is allowed."""
        if inbox.accepted or inbox.attempt + 1 >= _ATTEMPTS:
            raise
        if placement := self._placed_on.pop(request.id, None):
            self._cancel(placement, request.id, inbox.attempt)
        inbox.restart()

    def _cancel(self, placement: Placement, request: RequestId, attempt: int) -> None:
        member = self._members.get(placement.decode)
        if member is None:
            return

        async def cancel() -> None:
            with suppress(ServingError):
                await member.port.cancel(request, attempt)

        task = asyncio.ensure_future(cancel())
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)


def _own_id(id: RequestId) -> RequestId:  # noqa: A002
    """What workers call it. A caller may give an id again while they still speak for, or cancel, the one before."""
    return RequestId(f"{id}~{secrets.token_hex(4)}")


class _Answer:
    """From emissions to text."""

    def __init__(self, ask: Ask, text: TextModel) -> None:
        self._ask = ask
        self._detokenizer = text.detokenizer(continued=ask.continued)
        self._stops = StopStrings(ask.stop, include=ask.params.include_stop)
        self._count = 0
        self._served: Served | None = None
        self._prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self.ended_by_worker = False

    def take(self, emissions: list[Emission]) -> Delta:
        """Everything these tokens add to the answer."""
        text = ""
        tokens: list[int] = []
        kept: list[Emission] = []
        for emission in emissions:
            self._count += 1
            self._served = emission.served or self._served
            may_stop = self._count >= self._ask.params.min_tokens
            self.ended_by_worker = emission.finish is not None
            if emission.prompt_logprobs is not None:
                self._prompt_logprobs = emission.prompt_logprobs
            if emission.finish != "stop" or self._ask.params.include_stop:
                kept.append(emission)
                tokens.append(emission.token)
                shown, found = self._stops.push(self._detokenizer.push(emission.token), may_stop=may_stop)
                text += shown
                if found:
                    return self._delta(text, tokens, kept, "stop")
            if emission.finish:
                shown, found = self._stops.push(self._detokenizer.finish(), may_stop=may_stop)
                text += shown if found else shown + self._stops.finish()
                return self._delta(text, tokens, kept, "stop" if found else emission.finish)
        return self._delta(text, tokens, kept, None)

    def _delta(self, text: str, tokens: list[int], kept: list[Emission], finish: Finish | None) -> Delta:
        usage = None
        if finish:
            assert self._served is not None, "a worker's first emission says how it is served"
            usage = Usage(prompt_tokens=len(self._ask.tokens), completion_tokens=self._count, served=self._served)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Delta(
            text=text,
            tokens=tuple(tokens),
            fingerprints=tuple(each.fingerprint for each in kept if each.fingerprint is not None),
            argmax=tuple(each.argmax for each in kept if each.argmax is not None),
            logprobs=tuple(each.logprobs for each in kept if each.logprobs is not None),
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            usage=usage,
        )
