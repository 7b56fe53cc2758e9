"""A small cluster whose time, network, links and deaths are a test's: everything else is the real thing.

Real: both roles, both sides of the transfer, the pairs' bookkeeping, the batcher, the block pool,
packing, checksums. Simulated, one event at a time and from one seed: the threads (engines and links
are event handlers), the wire, and the model, whose KV is a chain over the tokens and whose next
token depends on every number in it: one wrong number anywhere gives a wrong answer.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from diptych.errors import TransferFailed, WorkerLost
from diptych.hashing import KvIdentity, granule_hashes
from diptych.types import (
    Emission,
    Failure,
    FrontId,
    KvLayout,
    KvOffer,
    ModelSource,
    PairAddress,
    Placement,
    Request,
    RequestId,
    SamplingParams,
    Verify,
    WorkerId,
    WorkerSpec,
)
from workers.borrowing import Borrower
from workers.decode import DecodeRole
from workers.engine.batching import Batcher, StepPlan, Work
from workers.engine.blocks import BlockPool
from workers.engine.engine import Engine, EngineLimits, StepResult
from workers.engine.kv_memory import private_memory, read_granules
from workers.engine.sampling import Sampled
from workers.engine.sequence import Sequence
from workers.lending import Lender
from workers.prefill import PrefillRole
from workers.transfer.legs import match_legs, narrower
from workers.transfer.pairs import ReceiverPairs, SenderPairs, Source
from workers.transfer.read_link import is_whole
from workers.transfer.receiving import Receiver
from workers.transfer.sending import Sender
from workers.transfer.shared_arena import ArenaView

LEASE = 1.0
PRIME = 113
FILL = 127
"""In the other half of each head: the int8 wire's scale is 1 then, and it loses nothing."""
VOCABULARY = 251
ROOT = KvIdentity(model_digest="m", weight_format="fp32", kv_dtype="fp32").root()
HEAD_DIM = 3
"""Odd: a wire that quantises turns it by 1."""


# ---- the model -------------------------------------------------------------------------------------------


def link_of_chain(before: int, token: int, position: int) -> int:
    return (before * 31 + token * 7 + position + 1) % PRIME


def answer_to(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """What a correct cluster says."""
    tokens, chain, total = list(prompt), 0, 0
    for position, token in enumerate(tokens):
        chain = link_of_chain(chain, token, position)
        total += chain * (position % 97 + 1)
    said: list[int] = []
    while len(said) < max_tokens:
        token = total % VOCABULARY
        said.append(token)
        tokens.append(token)
        chain = link_of_chain(chain, token, len(tokens) - 1)
        total += chain * ((len(tokens) - 1) % 97 + 1)
    return said


def whole(number: float) -> int:
    """What a number in the cache stands for, whatever became of it."""
    return int(number) if math.isfinite(number) else 13


class NoSampler:
    def forget(self, sequence: Sequence) -> None: ...


class ChainEngine(Engine):
    """Batches, blocks and counters are the real engine's; a step is arithmetic instead of a model."""

    def __init__(self, limits: EngineLimits) -> None:
        self.layout = KvLayout(layers=1, kv_heads=1, block_size=limits.block_size, head_dim=HEAD_DIM, dtype="fp32")
        self.limits = limits
        memory = private_memory(self.layout, limits.blocks, torch.device("cpu"))
        self.arena = memory.arena
        self.pool = BlockPool(limits.blocks, memory.generations)
        self.batcher = Batcher(
            self.pool,
            block_size=limits.block_size,
            max_batch_tokens=limits.max_batch_tokens,
            max_running=limits.max_running,
        )
        self.kv: Any = memory.arena.numpy()
        self._device = torch.device("cpu")
        self._sampler: Any = NoSampler()
        self._steps = self._decode_steps = self._decode_rows = 0
        self._computed = self._cached = self._emitted = self._preemptions = 0

    def execute(self, plan: StepPlan) -> StepResult:
        sampled: list[Sampled] = []
        works = (*(Work(sequence, sequence.computed, 1) for sequence in plan.decodes), *plan.chunks)
        for work in works:
            whole = work.count == work.sequence.remaining
            self._compute(work)
            self._advance(work)
            if whole:
                sampled.append(self._sample(work.sequence))
        return StepResult(plan=plan, sampled=tuple(sampled), failed=())

    def _compute(self, work: Work) -> None:
        sequence, size = work.sequence, self.limits.block_size
        before = 0
        if work.start:
            block, offset = sequence.blocks[(work.start - 1) // size], (work.start - 1) % size
            before = whole(self.kv[block, 0, 0, 0, offset, 0])
        for position in range(work.start, work.start + work.count):
            before = link_of_chain(before, sequence.tokens[position], position)
            block, offset = sequence.blocks[position // size], position % size
            self.kv[block, 0, 0, 0, offset] = before, FILL, FILL
            self.kv[block, 0, 1, 0, offset] = PRIME - before, FILL, FILL

    def _sample(self, sequence: Sequence) -> Sampled:
        """From all of its KV: both numbers of the keys and both of the values must be right to be used."""
        count = len(sequence.tokens)
        held = self.kv[sequence.blocks, 0].transpose(0, 3, 1, 2, 4).reshape(-1, 2, HEAD_DIM)[:count]
        total = 0
        for position, ((key, *fill), (value, *other)) in enumerate(held.tolist()):
            sound = key + value == PRIME and fill == other == [FILL, FILL]
            total += (whole(key) if sound else 13) * (position % 97 + 1)
        token, index = total % VOCABULARY, sequence.generated
        finish = sequence.accept(token)
        return Sampled(sequence, index, token, finish, None, None, None, None)


# ---- the world -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """A peer call under way."""

    caller: SimWorker
    callee: WorkerId
    name: str
    arguments: tuple[Any, ...]
    then: Callable[[Any], None] | None
    pending: tuple[str, tuple[Any, ...]] | None = None
    """What asks whether it still is."""
    settled: bool = False


class Recorder:
    """`what(peer)` of a call, taken down instead of made."""

    def __getattr__(self, name: str) -> Callable[..., tuple[str, tuple[Any, ...]]]:
        return lambda *arguments: (name, arguments)


class World:
    """One history. Everything that happens is an event on one heap."""

    def __init__(self, seed: int, tallies: Tallies) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.tallies = tallies
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.workers: dict[WorkerId, SimWorker] = {}
        self.channels: dict[PairAddress, Channel] = {}
        self.cut: set[frozenset[WorkerId]] = set()
        self.said: dict[RequestId, dict[int, int]] = {}
        self.over: dict[RequestId, str] = {}
        self.owner: dict[RequestId, WorkerId] = {}
        self.wanted: dict[RequestId, list[int]] = {}
        self.log: list[str] = []
        self.corruptions = 0
        """How many of the coming parcels arrive damaged."""
        self.armed: list[tuple[tuple[str, str], Callable[[SimWorker], None]]] = []
        """Faults that wait for a side to reach a state."""
        self.damages: tuple[str, ...] = DAMAGE
        self.wire = "native"
        self.may_be_wrong = False
        """Whether wrong tokens are counted, not forbidden."""
        self.seen: list[torch.Tensor] = []
        """Content of parcels, for swaps."""
        self.trouble: Counter[str] = Counter()
        """How many of the coming calls are lost, answered in vain, doubled or late."""

    def at(self, delay: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), what))

    def soon(self, what: Callable[[], None], scale: float = 0.004) -> None:
        self.at(self.random.random() * scale, what)

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, what = heapq.heappop(self._heap)
            what()
        self.now = until

    def channel(self, address: PairAddress) -> Channel:
        return self.channels.setdefault(address, Channel())

    def note(self, line: str) -> None:
        self.log.append(f"{self.now:7.3f} {line}")

    # ---- calls between workers -----------------------------------------------------------------------

    def call(self, call: Call) -> None:
        """Bounded by the lease, like `workers.calls`."""
        if call.pending is None:
            self.at(LEASE, lambda: self._settle(call, WorkerLost("no answer within the lease")))
        else:
            self.at(LEASE / 2, lambda: self._doubt(call))
        if self._take("lost call"):
            return
        if self._take("doubled call"):
            self.soon(lambda: self._deliver(call, answer=False), 0.3)
        self.soon(lambda: self._deliver(call), 0.5 if self._take("late call") else 0.004)

    def _take(self, trouble: str) -> bool:
        if self.trouble[trouble] and self.random.random() < 0.3:
            self.trouble[trouble] -= 1
            self.tallies.faults[trouble] += 1
            return True
        return False

    def _deliver(self, call: Call, *, answer: bool = True) -> None:
        callee = self.workers.get(call.callee)
        if callee is None or not callee.alive or frozenset((call.caller.id, call.callee)) in self.cut:
            if callee is None or not callee.alive:
                self._settle(call, WorkerLost(f"{call.callee} died"))
            return
        if callee.is_stopped:
            callee.missed.append(lambda: self._deliver(call, answer=answer))
            return
        callee.take(call.name, call.arguments, lambda said: self._answered(call, said) if answer else None)

    def _answered(self, call: Call, said: Any) -> None:
        if frozenset((call.caller.id, call.callee)) in self.cut or self._take("lost answer"):
            return
        self.soon(lambda: self._settle(call, said), 0.5 if self._take("late answer") else 0.004)

    def _settle(self, call: Call, said: Any) -> None:
        if call.settled or not call.caller.alive:
            return
        if call.caller.is_stopped:
            call.caller.missed.append(lambda: self._settle(call, said))
            return
        call.settled = True
        if call.then:
            call.caller.post(call.then, said)

    def _doubt(self, call: Call) -> None:
        """Is it still pending there? As `Calls._answer_of` asks."""
        if call.settled or not call.caller.alive:
            return
        callee = self.workers.get(call.callee)
        assert call.pending is not None
        reachable = frozenset((call.caller.id, call.callee)) not in self.cut
        known = callee is not None and callee.alive and not callee.is_stopped and reachable
        if known and callee is not None and callee.knows(*call.pending):
            self.at(LEASE / 2, lambda: self._doubt(call))
        else:
            self.at(LEASE / 2, lambda: self._settle(call, WorkerLost(f"{call.callee} lost the order")))

    # ---- the front -----------------------------------------------------------------------------------

    def hear(self, outgoing: Emission | Failure) -> None:
        if isinstance(outgoing, Failure):
            self.over.setdefault(outgoing.request, f"failure: {outgoing.error}")
            return
        said = self.said.setdefault(outgoing.request, {})
        known = said.setdefault(outgoing.index, outgoing.token)
        wanted = self.wanted[outgoing.request]
        if self.may_be_wrong and (known, outgoing.token) != (wanted[outgoing.index],) * 2:
            self.over[outgoing.request] = "wrong"
            return
        assert known == outgoing.token, f"{outgoing.request} token {outgoing.index}: {known} and {outgoing.token}"
        assert outgoing.token == wanted[outgoing.index], f"{outgoing.request}: a wrong token {outgoing}"
        if len(said) == len(wanted):
            self.over.setdefault(outgoing.request, "answered")


@dataclass
class Tallies:
    """Over all histories: what was reached."""

    states: Counter[str] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)


class SimWorker:
    """A worker without threads: its engine thread is a chain of events."""

    def __init__(self, world: World, spec: WorkerSpec, limits: EngineLimits) -> None:
        self.world, self.spec, self.id = world, spec, spec.id
        self.alive = True
        self.is_stopped = False
        self.missed: list[Callable[[], None]] = []
        self.inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.orders: set[tuple[Any, ...]] = set()
        self.grants: set[tuple[Any, ...]] = set()
        self.engine = ChainEngine(limits)
        place: Any = Place()
        self.sender = Sender(self.engine, spec, self, self.post)
        self.receiver = Receiver(self.engine, spec, self, self.post, place)
        for side, pairs in ((self.sender, SimSenderPairs), (self.receiver, SimReceiverPairs)):
            side._pairs.__class__ = pairs
            side._pairs.worker = self
        self.borrower = Borrower(self.engine, spec, self, self.receiver)
        self.lender = Lender(self.engine, spec, self, self.sender)
        self.prefill = PrefillRole(self.engine, spec, self, self.sender, self.borrower)
        self.decode = DecodeRole(self.engine, spec, self, self.receiver, self.borrower)
        self._arrivals = itertools.count()
        self._awake = False
        for side, tally in (
            ("sender", self.prefill.counters.tally),
            ("receiver", self.decode.counters.tally),
            ("lender", self.lender.tally),
            ("borrower", self.borrower.tally),
        ):
            tally.on_transition = lambda _, before, after, side=side: self._count(side, before, after)
        self.wake()

    def _count(self, side: str, before: Any, after: Any) -> None:
        self.world.tallies.transitions[f"{side} {before.value}>{after.value}"] += 1
        self.world.tallies.states[f"{side} {after.value}"] += 1
        for armed in [each for each in self.world.armed if each[0] == (side, after.value)]:
            self.world.armed.remove(armed)
            self.world.at(self.world.random.choice([0.0, 0.0, 0.02]), partial(armed[1], self))

    # ---- its engine's thread ---------------------------------------------------------------------------

    def post(self, what: Callable[..., None], *arguments: Any) -> None:
        if self.alive:
            self.inbox.append((what, arguments))
            self.wake()

    def wake(self, delay: float = 0.0) -> None:
        if not self._awake:
            self._awake = True
            self.world.at(delay + self.world.random.random() * 0.01, self._turn)

    def _turn(self) -> None:
        """As `EngineThread._run` goes round."""
        self._awake = False
        if not self.alive or self.is_stopped:
            return
        for _ in range(len(self.inbox)):
            what, arguments = self.inbox.popleft()
            what(*arguments)
        self.prefill.tick()
        self.receiver.tick()
        self.lender.tick()
        plan = self.engine.plan()
        self.decode.before_step(plan)
        self.prefill.before_step(plan)
        result = self.engine.execute(plan)
        self.decode.after_step(result)
        self.prefill.after_step(result)
        progress = bool(plan.decodes or plan.chunks or plan.granted or plan.preempted)
        self.wake(0.0 if progress or self.inbox else LEASE / 10)

    # ---- what it causes (workers.peers.Effects) ----------------------------------------------------------

    def emit(self, front: FrontId, outgoing: Emission | Failure) -> None:
        del front
        self.world.soon(lambda: self.world.hear(outgoing))

    def call(self, peer: WorkerId, what: Callable[[Any], Any], then: Callable[[Any], None] | None = None) -> None:
        name, arguments = what(Recorder())
        self.world.call(Call(self, peer, name, arguments, then))

    def wait(
        self,
        peer: WorkerId,
        what: Callable[[Any], Any],
        is_pending: Callable[[Any], Any],
        then: Callable[[Any], None],
    ) -> None:
        name, arguments = what(Recorder())
        self.world.call(Call(self, peer, name, arguments, then, pending=is_pending(Recorder())))

    def now(self) -> float:
        return self.world.now

    # ---- what it is told (workers.worker.Worker) -----------------------------------------------------------

    def take(self, name: str, arguments: tuple[Any, ...], answer: Callable[[Any], None]) -> None:
        if name == "run":
            self._run(arguments[0], answer)
        elif name == "grant":
            key = (arguments[0], arguments[1])
            self.grants.add(key)

            def reply(said: Any) -> None:
                self.grants.discard(key)
                answer(said)

            self.post(self.decode.grant, *arguments, reply)
        elif name == "expect":
            self.receiver.expect(*arguments)
            answer(None)
        elif name == "transfer_failed":
            self.post(self.decode.transfer_failed, *arguments)
            answer(None)
        elif name == "lend":
            self.post(self.lender.lend, *arguments, answer)
        elif name == "returned":
            self.post(self.lender.returned, *arguments)
            answer(None)
        elif name in ("committed", "withdraw"):
            self.post(getattr(self.prefill, name), *arguments)
            answer(None)
        else:
            raise AssertionError(name)

    def knows(self, asked: str, key: tuple[Any, ...]) -> bool:
        if asked == "is_pending":
            return key in self.orders
        if key in self.grants:
            self.post(self.decode.renew, *key)
        return key in self.grants

    def _run(self, order: Any, answer: Callable[[Any], None]) -> None:
        key = (order.request.id, order.attempt)
        if key in self.orders:
            answer(TransferFailed("ordered twice"))
            return
        self.orders.add(key)

        def reply(said: Any) -> None:
            self.orders.discard(key)
            answer(said)

        self.post(self.prefill.run, order, next(self._arrivals), reply)

    def submit(self, request: Request, placement: Placement) -> None:
        self.post(lambda: self.decode.submit(request, 0, placement, next(self._arrivals)))

    def meet(self, peer: SimWorker) -> None:
        """As `Worker.meet` finds out, for the link that the history is about."""
        offer = KvOffer(worker=peer.id, epoch=peer.spec.epoch, layout=peer.engine.layout, device="cpu")
        link = self.spec.link
        assert link != "auto"
        view = ArenaView(peer.engine.arena, peer.engine.pool._generations) if link == "mapped" else None
        wire = narrower(offer.layout, self.engine.layout) if self.spec.wire == "native" else self.spec.wire
        legs = match_legs(offer.layout, self.engine.layout)
        source = Source(offer=offer, link=link, wire=wire, legs=legs, view=view)
        self.post(self.receiver.met, peer.id, source)

    def left(self, peer: WorkerId) -> None:
        for side in (self.receiver, self.sender, self.prefill, self.lender):
            self.post(side.peer_left, peer, f"{peer} left")

    # ---- faults --------------------------------------------------------------------------------------------

    def transfers(self) -> list[str]:
        """Hand-offs under way here."""
        return [*self.receiver._inbound, *(transfer.id for transfer in self.sender._outbound)]

    def kill(self) -> None:
        self.alive = False
        self.inbox.clear()
        for channel in self.world.channels.values():
            if self in (channel.sender, channel.receiver):
                channel.is_cut = True
                channel.kick()

    def stop(self) -> None:
        self.is_stopped = True

    def go_on(self) -> None:
        self.is_stopped = False
        missed, self.missed = self.missed, []
        for what in missed:
            self.world.soon(what)
        self.wake()

    @property
    def is_busy(self) -> bool:
        work = (self.decode._answers, self.prefill._jobs, self.receiver._inbound, self.sender._outbound, self.inbox)
        return self.is_stopped or any(work) or bool(self.engine.pool.owners())

    def check_rest(self) -> None:
        """Nothing is under way and every block is free or cached."""
        pool = self.engine.pool
        pool.check()
        assert not pool.owners(), pool.owners()
        assert (pool.held, pool.granted, pool.lent) == (0, 0, 0)
        assert not self.decode._answers
        assert not self.decode._by_sequence
        assert not self.prefill._jobs
        assert not self.lender._loans
        assert not self.borrower._loans
        assert not self.prefill._by_sequence
        assert not self.receiver._inbound
        assert not self.sender._outbound
        assert not self.engine.batcher.granted
        assert not self.engine.has_work


# ---- links -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Channel:
    """What lies between the two ends of a pair."""

    sender: SimWorker | None = None
    receiver: SimWorker | None = None
    fifo: deque[tuple[int, torch.Tensor | None]] = field(default_factory=deque)
    is_cut: bool = False
    stalled_until: float = 0.0
    ends: list[Any] = field(default_factory=list)

    def kick(self) -> None:
        for end in self.ends:
            end.go()


class Place:
    """Nobody meets there."""

    host, port = "nowhere", 1


class SimSenderPairs(SenderPairs):
    worker: SimWorker

    def _end(self, link: Any, address: PairAddress) -> Any:
        del link
        broken = partial(self.worker.post, self.retire, (address,))
        return SimSenderPair(self.worker, address, self._verifier, lambda error: broken(str(error)))


class SimReceiverPairs(ReceiverPairs):
    worker: SimWorker

    def _end(self, source: Source, leg: Any, address: PairAddress) -> Any:
        broken = partial(self.worker.post, self.retire, (address,))
        return SimReceiverPair(
            self.worker,
            source,
            address,
            source.legs.index(leg),
            lambda parcel, content: self.worker.post(self._landed, parcel, content),
            lambda error: broken(str(error)),
        )


class SimSenderPair:
    """As `workers.transfer.pair.SenderPair`: one shipment after the other, announced before it is sent."""

    def __init__(
        self, worker: SimWorker, address: PairAddress, verifier: Any, on_broken: Callable[[TransferFailed], None]
    ) -> None:
        self.worker, self.world, self.address = worker, worker.world, address
        self._verifier, self._on_broken = verifier, on_broken
        self._queue: deque[Any] = deque()
        self._sequence = 0
        self._busy = False
        self._closed = False
        self.channel = self.world.channel(address)
        self.channel.sender = worker
        self.channel.ends.append(self)

    def ship(self, shipment: Any) -> None:
        self._queue.append(shipment)
        self.world.soon(self.go)

    def go(self) -> None:
        if self._closed or self._busy or not self.worker.alive:
            return
        if self.worker.is_stopped:
            self.worker.missed.append(self.go)
            return
        if self.channel.is_cut:
            self._break("the other side is gone")
            return
        if self._queue:
            self._busy = True
            self._send(self._queue.popleft())

    def _send(self, shipment: Any) -> None:
        parcel = replace(shipment.parcel, sequence=self._sequence)
        parcel = replace(parcel, checksum=self._verifier.checksum(parcel, shipment.content))
        self._sequence += 1
        shipment.announce(parcel)
        reads = parcel.source is not None
        content = None if reads else shipment.content().clone()

        def leave() -> None:
            if self.worker.is_stopped:
                self.worker.missed.append(leave)
                return
            if self._closed or not self.worker.alive:
                return
            if self.world.now < self.channel.stalled_until:
                self.world.at(self.channel.stalled_until - self.world.now, leave)
                return
            if not reads:
                self.channel.fifo.append((parcel.sequence, content))
            self._busy = False
            shipment.sent(parcel)
            self.channel.kick()
            self.go()

        self.world.soon(leave, 0.02)

    def _break(self, why: str) -> None:
        self._closed = True
        self.channel.is_cut = True
        self.world.soon(lambda: self._on_broken(TransferFailed(why)))

    def close(self) -> None:
        self._closed = True
        self.channel.is_cut = True
        self.channel.kick()

    def wait_closed(self, timeout_seconds: float) -> bool:
        return bool(timeout_seconds)


class SimReceiverPair:
    """As `workers.transfer.pair.ReceiverPair`: parcels in the order of their numbers, however announced."""

    def __init__(
        self,
        worker: SimWorker,
        source: Source,
        address: PairAddress,
        leg: int,
        on_landed: Callable[[Any, Any], None],
        on_broken: Callable[[TransferFailed], None],
    ) -> None:
        self.worker, self.world, self.address, self.leg = worker, worker.world, address, leg
        self._source, self._on_landed, self._on_broken = source, on_landed, on_broken
        self._announced: dict[int, Any] = {}
        self._expected = 0
        self._busy = False
        self._closed = False
        self._since = 0.0
        self.channel = self.world.channel(address)
        self.channel.receiver = worker
        self.channel.ends.append(self)

    def expect(self, parcel: Any) -> None:
        self._announced[parcel.sequence] = parcel
        self._since = self.world.now
        self.world.at(LEASE * (1 + self.world.random.random() / 3), self._time_out)
        self.world.soon(self.go)

    def go(self) -> None:
        if self._closed or self._busy or not self.worker.alive:
            return
        if self.worker.is_stopped:
            self.worker.missed.append(self.go)
            return
        if self.channel.is_cut and not self.channel.fifo:
            self._break("the other side is gone")
            return
        if self.world.now < self.channel.stalled_until:
            self.world.at(self.channel.stalled_until - self.world.now, self.go)
            return
        parcel = self._announced.get(self._expected)
        if parcel is None:
            return
        if parcel.source is not None:
            self._begin(parcel, self._read)
        elif self.channel.fifo:
            self._begin(parcel, self._receive)

    def _begin(self, parcel: Any, how: Callable[[Any], None]) -> None:
        self._busy = True
        del self._announced[self._expected]
        self._expected += 1
        how(parcel)

    def _receive(self, parcel: Any) -> None:
        sequence, content = self.channel.fifo.popleft()
        assert sequence == parcel.sequence, "order is the only match, and it broke"
        self.world.soon(lambda: self._land(parcel, content), 0.02)

    def _read(self, parcel: Any) -> None:
        """Copy the first half, let the world go on, copy the rest, then look at the generations."""
        view = self._source.view
        assert view is not None
        if not is_whole(parcel.source, view):
            self._land(parcel, None)
            return
        first = read_granules(view.arena, parcel.source, parcel.count)

        def finish() -> None:
            content = read_granules(view.arena, parcel.source, parcel.count)
            half = len(content) // 2
            content[:half] = first[:half]
            self._land(parcel, content if is_whole(parcel.source, view) else None)

        self.world.at(self.world.random.choice([0.001, 0.05, 0.5, 0.9]) * LEASE, finish)

    def _land(self, parcel: Any, content: torch.Tensor | None) -> None:
        self._busy = False
        if self._closed or not self.worker.alive:
            return
        if self.worker.is_stopped:
            self.worker.missed.append(lambda: self._land(parcel, content))
            return
        if content is not None and self.world.corruptions and self.world.random.random() < 0.5:
            self.world.corruptions -= 1
            parcel, content = damage(self.world, parcel, content)
        if content is not None and len(self.world.seen) < 8:
            self.world.seen.append(content)
        self._on_landed(parcel, content)
        self.go()

    def _time_out(self) -> None:
        waiting = self._announced.get(self._expected) is not None and not self._busy
        if waiting and not self._closed and self.worker.alive and self.world.now - self._since >= LEASE:
            self._break("nothing came within the lease")

    def _break(self, why: str) -> None:
        self._closed = True
        self.channel.is_cut = True
        self.channel.kick()
        self.world.soon(lambda: self._on_broken(TransferFailed(why)))

    def close(self) -> None:
        self._closed = True
        self.channel.is_cut = True
        self.channel.kick()

    def wait_closed(self, timeout_seconds: float) -> bool:
        return bool(timeout_seconds)


# ---- damage ----------------------------------------------------------------------------------------------

DAMAGE = ("header", "scales", "keys", "values", "padding", "ids", "generations", "swap")


def damage(world: World, parcel: Any, content: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A parcel that arrives otherwise than it left, in one of its classes of bytes."""
    kind = world.random.choice(world.damages)
    changed = content.clone()
    if kind == "header":
        name = world.random.choice(["first", "count", "leg", "epoch", "sequence", "nbytes"])
        parcel = replace(parcel, **{name: getattr(parcel, name) + world.random.choice([-1, 1, 7])})
    elif kind == "ids":
        others = [inbound for worker in world.workers.values() for inbound in worker.receiver._inbound]
        parcel = replace(parcel, transfer=world.random.choice([*others, "nobody's"]))
    elif kind == "swap" and world.seen:
        changed = world.random.choice(world.seen)
    elif kind == "generations":
        for worker in world.workers.values():
            for inbound in worker.receiver._inbound.values():
                if inbound.promise and inbound.transfer.id == parcel.transfer:
                    block = world.random.choice([*inbound.promise.generations, None])
                    if block is not None:
                        worker.engine.pool._generations[block] += 1
    else:
        at = _place(world, kind, parcel, len(changed))
        changed[at] ^= 1 << world.random.randrange(8)
    world.tallies.faults[f"damaged {kind}"] += 1
    return parcel, changed


def _place(world: World, kind: str, parcel: Any, size: int) -> int:
    """A byte of that class: a packed granule is [scales of keys, of values] [keys 16 x 3] [values 16 x 3]."""
    granule = size // max(1, parcel.count)
    scales = 2 * 16 * 2 if parcel.nbytes and world.wire == "int8" and parcel.source is None else 0
    numbers = (granule - scales) // 2
    start = world.random.randrange(max(1, parcel.count)) * granule
    if kind == "scales" and scales:
        return start + world.random.randrange(scales)
    if kind == "padding":  # what follows the prompt in its last granule
        return size - 1 - world.random.randrange(8)
    return start + scales + (numbers if kind == "values" else 0) + world.random.randrange(numbers)


# ---- histories -------------------------------------------------------------------------------------------

LIMIT_SECONDS = 40 * LEASE
"""In which every history is over: its faults end within the first of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a batch of histories has in common."""

    faults: tuple[str, ...]
    most_faults: int = 3
    armed: float = 0.5
    """The share of them that waits for a side to reach a state."""
    states: tuple[tuple[str, str], ...] = tuple(
        (side, state)
        for side in ("sender", "receiver")
        for state in ("granted", "sending", "sending", "landed", "committed")
    )
    follow_ups: bool = False
    """Every prompt was asked before, and comes with its prefix from elsewhere."""
    troubles: tuple[str, ...] = ()
    """What happens to calls from the start, often."""
    damages: int = 0
    classes: tuple[str, ...] = DAMAGE
    may_be_wrong: bool = False
    verify: tuple[Verify, ...] = ("off", "all")
    links: tuple[Any, ...] = ("gloo", "mapped")
    wires: tuple[Any, ...] = ("native", "int8")


class History:
    """Some requests, some faults, and what must hold at the end of it."""

    def __init__(self, seed: int, kind: Kind, tallies: Tallies) -> None:
        self.kind = kind
        self.world = World(seed, tallies)
        self.random = self.world.random
        self.epochs: Counter[WorkerId] = Counter()
        link, wire = self.random.choice(kind.links), self.random.choice(kind.wires)
        self.world.wire = wire
        self.spec = WorkerSpec(
            id=WorkerId("?"),
            role="decode",
            epoch=0,
            model=ModelSource(name="m", path="", digest="m"),
            dtype="fp32",
            block_size=16,
            memory_bytes=0,
            max_batch_tokens=self.random.choice([16, 48, 512]),
            max_running=8,
            threads=1,
            device="cpu",
            host="nowhere",
            link=link,
            wire=wire,
            verify=self.random.choice(kind.verify),
            secret=b"s",
            lease_seconds=LEASE,
            cache="",
        )
        self.prefills = [WorkerId(f"p{number}") for number in range(self.random.choice([1, 1, 2]))]
        self.decodes = [WorkerId(f"d{number}") for number in range(self.random.choice([1, 1, 2]))]
        self.sizes = {who: self.random.choice([16, 16, 32]) for who in (*self.prefills, *self.decodes)}
        for who in self.sizes:
            self._start(who)
        self._prompts = [self._tokens() for _ in range(3)]

    def _start(self, who: WorkerId) -> None:
        spec = replace(self.spec, id=who, epoch=self.epochs[who], block_size=self.sizes[who])
        self.epochs[who] += 1
        blocks = self.random.choice([9, 14, 40]) * 16 // spec.block_size
        limits = EngineLimits(
            block_size=spec.block_size,
            blocks=blocks,
            max_batch_tokens=spec.max_batch_tokens,
            max_running=spec.max_running,
            max_context=blocks * spec.block_size,
        )
        worker = self.world.workers[who] = SimWorker(self.world, spec, limits)
        for other in [*self.world.workers.values()]:
            if other is not worker and other.alive:
                other.meet(worker)
                worker.meet(other)

    def _tokens(self) -> tuple[int, ...]:
        return tuple(self.random.choices(range(VOCABULARY), k=self.random.choice([3, 16, 17, 40, 64, 90])))

    # ---- what happens ------------------------------------------------------------------------------------

    def run(self) -> None:
        requests = [self._submit(number) for number in range(self.random.choice([1, 2, 4, 6]))]
        for _ in range(self.random.randint(1, self.kind.most_faults) if self.kind.faults else 0):
            fault = self.random.choice(self.kind.faults)
            if self.random.random() >= self.kind.armed:
                self.world.at(self.random.random() ** 2 * LEASE, partial(self._fault, fault))
            else:
                state = self.random.choice(self.kind.states)
                self.world.armed.append((state, partial(self._fault, fault)))
        self.world.corruptions, self.world.damages = self.kind.damages, self.kind.classes
        self.world.trouble.update(dict.fromkeys(self.kind.troubles, 20))
        self.world.may_be_wrong = self.kind.may_be_wrong
        while self.world.now < LIMIT_SECONDS and not self._is_over(requests):
            self.world.run(self.world.now + LEASE)
        for request in requests:
            assert request in self.world.over, f"{request} never ended"
            self.world.tallies.ends[self.world.over[request].split(":")[0]] += 1
        for worker in self.world.workers.values():
            if worker.alive:
                worker.check_rest()

    def _is_over(self, requests: list[RequestId]) -> bool:
        """Nothing is left to do: what would still happen is idle looking."""
        alive = [worker for worker in self.world.workers.values() if worker.alive]
        return (
            self.world.now > 5 * LEASE
            and all(request in self.world.over for request in requests)
            and not any(worker.is_busy for worker in alive)
        )

    def _submit(self, number: int) -> RequestId:
        prompt = self.random.choice(self._prompts)[: self.random.choice([None, None, 33])]
        if self.kind.follow_ups:
            prompt = (*self._prompts[0], *self._tokens()[:20]) if number else (*self._prompts[0], 1)
        elif self.random.random() < 0.5:
            prompt += self._tokens()[:30]
        name, decode = RequestId(f"r{number}"), self.random.choice(self.decodes)
        world, most = self.world, self.random.choice([1, 2, 5, 20])
        request = Request(
            id=name,
            front=FrontId("front"),
            tokens=prompt,
            granules=granule_hashes(prompt, ROOT),
            root=ROOT,
            params=SamplingParams(max_tokens=most, temperature=0.0, seed=1),
        )
        world.wanted[name] = answer_to(prompt, most)
        prefill = self.random.choice([*self.prefills, *self.prefills, None])
        how = "remote" if prefill else "local"
        lender = self.random.choice([None, *(who for who in self.sizes if who != (prefill or decode))])
        placement = Placement(decode=decode, prefill=prefill, how=how, reason="", prefix_from=lender)

        def submit() -> None:
            worker = world.workers[decode]
            world.owner[name] = decode
            if not worker.alive:
                world.over[name] = "lost with its worker"
                return
            if len(prompt) + most > worker.engine.limits.max_context:
                world.over[name] = "too long"
                return
            worker.submit(request, placement)

        if self.kind.follow_ups:
            world.at(number * self.random.choice([0.1, 0.5]) * LEASE, submit)
            return name
        # Some come late: they take the blocks that earlier ones lost.
        world.at(self.random.random() * self.random.choice([0.5, 0.5, 3.0]) * LEASE, submit)
        return name

    def _fault(self, name: str, where: SimWorker | None = None) -> None:
        world, workers = self.world, [worker for worker in self.world.workers.values() if worker.alive]
        if name in ("lost call", "lost answer", "doubled call", "late call", "late answer"):
            world.trouble[name] += self.random.choice([1, 2, 5])
            return
        if not workers:
            return
        world.tallies.faults[name] += 1
        if name == "death":
            self._kill(self._one_of(workers, where))
        elif name == "pause":
            worker = self._one_of(workers, where)
            worker.stop()
            world.at(self.random.choice([0.1, 0.9, 1.5, 3.0]) * LEASE, worker.go_on)
        elif name == "partition":
            pair = frozenset((self.random.choice(self.prefills), self.random.choice(self.decodes)))
            world.cut.add(pair)
            world.at(self.random.choice([0.2, 2.0]) * LEASE, lambda: world.cut.discard(pair))
        elif name == "cut link":
            for channel in self.random.sample([*world.channels.values()], min(1, len(world.channels))):
                channel.is_cut = True
                channel.kick()
        elif name == "stalled link":
            for channel in world.channels.values():
                channel.stalled_until = world.now + self.random.choice([0.3, 0.9, 2.0]) * LEASE
        elif name == "cancel":
            self._cancel(where)
        elif name == "full cache":
            worker = self.random.choice(workers)
            worker.post(worker.engine.pool.clear)
        else:
            raise AssertionError(name)

    def _kill(self, worker: SimWorker) -> None:
        world = self.world
        worker.kill()
        for request, owner in world.owner.items():
            if owner == worker.id:
                world.over.setdefault(request, "lost with its worker")
        for other in world.workers.values():
            if other.alive:
                world.soon(partial(other.left, worker.id), 0.3)
        if self.random.random() < 0.7:
            world.at(self.random.choice([0.35, 1.2]), partial(self._start, worker.id))

    def _one_of(self, workers: list[SimWorker], where: SimWorker | None) -> SimWorker:
        """The one where it happens, or its peer."""
        return where if where in workers and self.random.random() < 0.5 else self.random.choice(workers)

    def _cancel(self, where: SimWorker | None) -> None:
        world = self.world
        running = [request for request in world.owner if request not in world.over]
        busy = [request for request in running if where and any(request in transfer for transfer in where.transfers())]
        for request in self.random.sample(busy or running, min(1, len(busy or running))):
            owner = world.workers[world.owner[request]]
            if owner.alive:
                world.over[request] = "cancelled"
                owner.post(owner.decode.cancel, request, 0)


@pytest.fixture
def tallies() -> Tallies:
    return Tallies()


@pytest.fixture
def kind() -> type[Kind]:
    return Kind


@pytest.fixture
def play(tallies: Tallies) -> Callable[[Kind, Iterator[int]], int]:
    """(kind, seeds) → how many histories were played; a failure names the seed that replays it."""

    def plays(kind: Kind, seeds: Iterator[int]) -> int:
        count = 0
        for seed in seeds:
            try:
                History(seed, kind, tallies).run()
            except BaseException as error:
                error.add_note(f"seed {seed} of {kind}")
                raise
            count += 1
        return count

    return plays
