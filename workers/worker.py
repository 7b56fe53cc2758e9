"""A worker one can hold in a test: an engine thread, both roles, and the calls that reach them.

Lives on one event loop. Knows no Ray: peers and the scheduler are objects with async methods.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from diptych.build import build_identity
from diptych.errors import (
    Draining,
    InvalidRequest,
    LayoutMismatch,
    PromptTooLong,
    ServingError,
    TransferFailed,
    WorkerLost,
)
from diptych.packing import packed_steps
from diptych.token_line import TokenLineServer
from diptych.types import (
    BlockHash,
    FrontId,
    KvLayout,
    KvOffer,
    KvParcel,
    KvTicket,
    Outgoing,
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
from workers.borrowing import Borrower
from workers.calls import Calls
from workers.decode import DecodeRole
from workers.engine.engine import Engine, EngineLimits, layout_of
from workers.engine.kv_memory import KvMemory
from workers.engine.loading import GpuChoice, load_model
from workers.engine_thread import EngineThread, Roles, Snapshot
from workers.lending import Lender
from workers.memory import kv_bytes
from workers.outbox import Outbox
from workers.peers import Peer
from workers.prefill import PrefillRole
from workers.reporter import Reporter
from workers.transfer.acquaintance import Acquaintance, Neighbours
from workers.transfer.doorway import Doorway
from workers.transfer.fail_points import fail_points
from workers.transfer.link import MeetingPlace
from workers.transfer.nixl import NixlAgent
from workers.transfer.receiving import Receiver
from workers.transfer.sending import Sender
from workers.transfer.shared_arena import SharedArena

T = TypeVar("T")
_QUIET_SECONDS = 1.0
"""So long nobody needed a block of a worker that drains: those who go on elsewhere would have come."""
_LOOK_SECONDS = 0.05
_LAST_WORDS_SECONDS = 1.0
"""How long a worker without an engine waits for fronts to hear of it."""


class Worker:
    """`start` first, `meet` the others, then requests; `stop` ends everything it began."""

    def __init__(self, spec: WorkerSpec, neighbours: Neighbours | None = None) -> None:
        """`neighbours`: workers of this process, which may read each other's KV."""
        self.spec = spec
        self._neighbours = Neighbours() if neighbours is None else neighbours
        self._loop = asyncio.get_running_loop()
        self._engine = EngineThread(spec.id, spec.threads)
        self._calls = Calls(self._engine.post, spec.lease_seconds)
        self._outbox = Outbox(self.front_left)
        self._line = TokenLineServer(spec.secret, lambda front: packed_steps(self._outbox.read(FrontId(front))))
        self.token_line = ""
        """Where fronts hear its tokens; empty when it could not listen."""
        self._reporter = Reporter(spec.id, spec.epoch, self._engine.request_full_report)
        self._arrivals = itertools.count()
        self._stopping = False
        self._draining = False
        self._met: dict[WorkerId, int] = {}
        """The newest incarnation of each worker that was ever met."""
        self._orders: set[tuple[RequestId, int]] = set()
        """Orders of decode workers that were not answered yet."""
        self._grants: set[tuple[RequestId, int]] = set()
        """Tickets that prefill workers wait for."""
        self._unanswered: set[asyncio.Future[Any]] = set()
        self._broken: asyncio.Future[BaseException] = self._loop.create_future()
        self._arena: SharedArena | None = None
        self._doorway: Doorway | None = None
        self._nixl: NixlAgent | None = None
        self._roles: Roles
        self._acquaintance: Acquaintance
        self._offer: KvOffer
        self._computes = ""
        self.info: WorkerInfo

    # ---- life -----------------------------------------------------------------------------------------

    async def start(self) -> WorkerInfo:
        """Load the model. Raises what went wrong there."""
        ready: asyncio.Future[Roles] = self._loop.create_future()

        def hear(outcome: Roles | BaseException) -> None:
            if isinstance(outcome, BaseException):
                self._loop.call_soon_threadsafe(ready.set_exception, outcome)
            else:
                self._loop.call_soon_threadsafe(ready.set_result, outcome)

        self._engine.start(lambda: (self._build(), self, self._calls.take_step), hear)
        self._roles = await ready
        self.info = self._describe(self._roles.engine)
        self._offer = KvOffer(
            worker=self.spec.id,
            epoch=self.spec.epoch,
            layout=self._roles.engine.layout,
            device=self.spec.device,
            mapped=self._doorway.address if self._doorway else "",
            nixl=self._nixl.offer if self._nixl else None,
        )
        with suppress(OSError):  # fronts can do without it
            self.token_line = await self._line.open(self.spec.host)
        self._acquaintance = Acquaintance(self.spec, self._roles.engine.layout, self._neighbours, self._nixl)
        return self.info

    async def meet(self, peers: Mapping[WorkerId, Peer]) -> None:
        """All the other members, from now on. Returns when it is known how their KV comes here."""
        for worker in self._calls.meet(dict(peers)):
            self._peer_left(worker, f"{worker} left")
        await asyncio.gather(*(self._meet(worker, peer) for worker, peer in peers.items()))

    async def _meet(self, worker: WorkerId, peer: Peer) -> None:
        try:
            offer = await asyncio.wait_for(peer.offer(), self.spec.lease_seconds)
        except (ServingError, TimeoutError):
            return  # it is dying, and whoever follows it will be met
        known = self._met.get(worker, offer.epoch)
        if offer.epoch < known:
            return  # its successor was met meanwhile
        if offer.epoch > known:
            self._peer_left(worker, f"{worker} was started again")
        self._met[worker] = offer.epoch
        try:
            source = await asyncio.to_thread(self._acquaintance.source, offer)
        except (LayoutMismatch, TransferFailed) as error:
            source = error
        if self._met[worker] == offer.epoch:
            self._engine.post(self._roles.receiver.met, worker, source)

    def _peer_left(self, worker: WorkerId, reason: str) -> None:
        for side in (self._roles.receiver, self._roles.sender, self._roles.prefill, self._roles.lender):
            self._engine.post(side.peer_left, worker, reason)

    def report_to(self, report: Callable[[Report], Awaitable[bool]]) -> None:
        """Where reports go. A new scheduler gets a full one."""
        self._reporter.report_to(report)

    async def drain(self, timeout_seconds: float) -> int:
        """Takes nothing new; its answers go on elsewhere. Returns how many, when nobody needs its blocks any more.

        Its cache can be borrowed from all the while: that is how the KV of its answers goes with them.
        """
        self._draining = True
        moved: int = await self._answered(lambda reply: reply(self._roles.decode.hand_back(f"{self.spec.id} drains")))
        end = self._loop.time() + timeout_seconds
        quiet_since = self._loop.time()
        while self._loop.time() < end and self._loop.time() - quiet_since < _QUIET_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
            owners: int = await self._answered(lambda reply: reply(len(self._roles.engine.pool.owners())))
            if owners or self._orders:
                quiet_since = self._loop.time()
        return moved

    async def stop(self, timeout_seconds: float = 10.0) -> bool:
        """Streams end, links close, the engine stops after its step. Whether all did in time."""
        self._stopping = True
        stopped = await asyncio.to_thread(self._engine.stop, timeout_seconds)
        if self._doorway and self._arena:
            self._neighbours.remove(self.spec.id, self.spec.epoch)
            self._doorway.close()
            self._arena.close()
        self._end(WorkerLost(f"{self.spec.id} stopped"))
        await self._line.wait_told(_LAST_WORDS_SECONDS)
        return stopped

    async def wait_broken(self) -> BaseException:
        """Until a bug ended the engine; what it was. By then every front that still reads knows."""
        error = await self._broken
        with suppress(TimeoutError):
            await asyncio.wait_for(self._outbox.wait_empty(), _LAST_WORDS_SECONDS)
        return error

    def _end(self, why: WorkerLost) -> None:
        """Whoever waits for this worker waits no more."""
        self._stopping = True
        for future in list(self._unanswered):
            if not future.done():
                future.set_exception(why)
        self._calls.close()
        self._reporter.close()
        self._line.close()
        self._outbox.close()

    def _engine_broke(self, error: BaseException) -> None:
        self._end(WorkerLost(f"the engine of {self.spec.id} broke: {error!r}"))
        self._broken.set_result(error)

    # ---- fronts -----------------------------------------------------------------------------------------

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None:
        """Own the request. Raises PromptTooLong when it could never fit, Draining when going away."""
        self._check_serves()
        self._check_fits(request)
        self._engine.post(self._submit, request, attempt, placement)

    def _check_serves(self) -> None:
        if self._stopping or self._draining:
            raise Draining(f"{self.spec.id} is {'stopping' if self._stopping else 'draining'}")

    def _submit(self, request: Request, attempt: int, placement: Placement) -> None:
        self._roles.decode.submit(request, attempt, placement, next(self._arrivals))

    async def cancel(self, request: RequestId, attempt: int) -> None:
        """Idempotent; takes effect before the next step."""
        self._engine.post_cancel(self._roles.decode.cancel, request, attempt)

    def outbox(self, front: FrontId) -> AsyncGenerator[tuple[Outgoing, ...], None]:
        """All tokens for this front."""
        return self._outbox.read(front)

    def owns(self, request: RequestId, attempt: int) -> bool:
        """Whether it will still speak for the request: known here, and the engine moves."""
        return self.silent_seconds() < self.spec.lease_seconds and self._roles.decode.owns(request, attempt)

    def silent_seconds(self) -> float:
        """How long the engine has not come round while it had work."""
        return self._engine.silent_seconds()

    def front_left(self, front: FrontId) -> None:
        """Nobody reads its answers any more."""
        self._outbox.forget(front)
        self._engine.post_cancel(self._roles.decode.cancel_all, front)

    # ---- peers (workers.peers.Peer) -----------------------------------------------------------------------

    async def offer(self) -> KvOffer:
        return self._offer

    async def run(self, order: PrefillOrder) -> PrefillDone:
        if self._draining:
            raise Draining(f"{self.spec.id} is draining")
        key = (order.request.id, order.attempt)
        if key in self._orders:
            raise TransferFailed(f"{order.request.id}: ordered twice")
        self._orders.add(key)
        try:
            return await self._answered(lambda reply: self._roles.prefill.run(order, next(self._arrivals), reply))
        finally:
            self._orders.discard(key)

    async def is_pending(self, request: RequestId, attempt: int) -> bool:
        return self.silent_seconds() < self.spec.lease_seconds and (request, attempt) in self._orders

    async def committed(self, transfer: TransferId) -> None:
        self._engine.post(self._roles.prefill.committed, transfer)

    async def withdraw(self, request: RequestId, attempt: int) -> None:
        self._engine.post_cancel(self._roles.prefill.withdraw, request, attempt)

    async def grant(self, request: RequestId, attempt: int) -> KvTicket | None:
        self._grants.add((request, attempt))
        try:
            return await self._answered(lambda reply: self._roles.decode.grant(request, attempt, reply))
        finally:
            self._grants.discard((request, attempt))

    async def is_granting(self, request: RequestId, attempt: int) -> bool:
        if self.silent_seconds() >= self.spec.lease_seconds or (request, attempt) not in self._grants:
            return False
        self._engine.post(self._roles.decode.renew, request, attempt)
        return True

    async def expect(self, sender: WorkerId, parcel: KvParcel) -> None:
        self._roles.receiver.expect(sender, parcel)

    async def lend(self, ticket: KvTicket, names: tuple[BlockHash, ...]) -> int:
        return await self._answered(lambda reply: self._roles.lender.lend(ticket, names, reply))

    async def returned(self, transfer: TransferId) -> None:
        self._engine.post(self._roles.lender.returned, transfer)

    async def transfer_failed(self, request: RequestId, attempt: int, reason: str) -> None:
        self._engine.post(self._roles.decode.transfer_failed, request, attempt, reason)

    # ---- the engine's thread (Listener) ---------------------------------------------------------------------

    def step_done(self, outgoing: Mapping[FrontId, list[Outgoing]]) -> None:
        self._loop.call_soon_threadsafe(self._outbox.put, outgoing)

    def changed(self, snapshot: Snapshot) -> None:
        self._loop.call_soon_threadsafe(self._reporter.add, snapshot)

    def broke(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._engine_broke, error)

    # ---- inside -----------------------------------------------------------------------------------------------

    async def _answered(self, ask: Callable[[Callable[[T | ServingError], None]], None]) -> T:
        """Ask a role something on the engine's thread; its answer comes back here."""
        if self._stopping:
            raise WorkerLost(f"{self.spec.id} is stopping")
        future: asyncio.Future[T] = self._loop.create_future()
        self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)

        def settle(answer: T | ServingError) -> None:
            if future.done():
                return  # whoever asked was cancelled meanwhile
            if isinstance(answer, ServingError):
                future.set_exception(answer)
            else:
                future.set_result(answer)

        def reply(answer: T | ServingError) -> None:
            self._loop.call_soon_threadsafe(settle, answer)

        self._engine.post(ask, reply)
        return await future

    def _check_fits(self, request: Request) -> None:
        prompt_tokens = len(request.tokens) - request.said
        needed, limit = prompt_tokens + request.params.max_tokens, self.info.max_context
        if needed > limit:
            raise PromptTooLong(
                f"{prompt_tokens} prompt tokens and {request.params.max_tokens} to generate are {needed}, "
                f"{self.spec.id} holds {limit}: shorten the prompt, lower max_tokens or raise kv.memory",
                param="max_tokens",
            )

    def _build(self) -> Roles:
        spec, device = self.spec, torch.device(self.spec.device)
        cache = Path(spec.cache) if spec.cache else None
        model, self._computes = load_model(
            spec.model,
            spec.dtype,
            spec.weights,
            cache=cache,
            device=device,
            threads=spec.threads,
            activations=spec.activations,
            on_gpu=GpuChoice(
                spec.kernels, spec.cuda_graphs, spec.attention, spec.block_size, fp8_kv=spec.kv_dtype == "fp8"
            ),
        )
        config = model.config
        layout = layout_of(config, spec.block_size, spec.kv_dtype)
        blocks = kv_bytes(spec.memory_bytes, device) // layout.block_bytes
        if blocks < 2:
            raise InvalidRequest(
                f"kv.memory holds {blocks} blocks of {layout.block_bytes} bytes; at least 2 are needed",
                param="kv.memory",
            )
        # More than every running sequence at full length is never used.
        blocks = min(blocks, spec.max_running * -(-config.context // spec.block_size))
        limits = EngineLimits(
            block_size=spec.block_size,
            blocks=blocks,
            max_batch_tokens=spec.max_batch_tokens,
            max_running=spec.max_running,
            max_context=min(config.context, blocks * spec.block_size),
            eviction=spec.eviction,
        )
        memory = self._share(layout, blocks, device)
        engine = Engine(model, limits, dtype=spec.kv_dtype, device=device, memory=memory)
        place = MeetingPlace(spec.host, spec.lease_seconds)
        sender = Sender(engine, spec, self._calls, self._engine.post)
        receiver = Receiver(engine, spec, self._calls, self._engine.post, place)
        borrower = Borrower(engine, spec, self._calls, receiver)
        roles = Roles(
            engine=engine,
            prefill=PrefillRole(engine, spec, self._calls, sender, borrower),
            decode=DecodeRole(engine, spec, self._calls, receiver, borrower),
            sender=sender,
            receiver=receiver,
            lender=Lender(engine, spec, self._calls, sender),
            borrower=borrower,
        )
        for tally in (roles.prefill.counters.tally, roles.lender.tally):
            tally.on_transition = fail_points("sender", os.environ)
        for tally in (roles.decode.counters.tally, roles.borrower.tally):
            tally.on_transition = fail_points("receiver", os.environ)
        return roles

    def _share(self, layout: KvLayout, blocks: int, device: torch.device) -> KvMemory | None:
        """The KV memory that others may read; None where it is the engine's alone."""
        if self.spec.link in ("gloo", "nccl"):
            return None
        try:
            self._arena = SharedArena(layout, blocks, device)
            if self.spec.link == "nixl":
                # Other incarnations of this name must not be mistaken for it.
                name = f"{self.spec.id}.{self.spec.epoch}.{os.getpid()}.{secrets.token_hex(4)}"
                self._nixl = NixlAgent(name, self._arena, self.spec.lease_seconds)
        except (ImportError, OSError) as error:  # no CuPy beside a GPU, no NIXL; no memory files
            if self.spec.link != "auto":
                raise InvalidRequest(
                    f"kv.link = {self.spec.link} needs KV memory that others can read, and {error}: set it to auto, or "
                    "install diptych[nixl] for nixl, diptych[cuda] for mapped on GPUs",
                    param="kv.link",
                ) from error
            return None
        self._doorway = Doorway(self._arena, self.spec.secret)
        self._neighbours.add(self.spec.id, self.spec.epoch, self._arena)
        return self._arena.memory

    def _describe(self, engine: Engine) -> WorkerInfo:
        return WorkerInfo(
            id=self.spec.id,
            role=self.spec.role,
            epoch=self.spec.epoch,
            build=build_identity(),
            model_digest=self.spec.model.digest,
            layout=engine.layout,
            blocks=engine.limits.blocks,
            max_context=engine.limits.max_context,
            device=self.spec.device,
            host=self.spec.host,
            pid=os.getpid(),
            threads=self.spec.threads,
            computes=self._computes,
        )
