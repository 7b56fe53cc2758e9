"""The receiving side of hand-offs: promises room, lets parcels land in it, and nothing else in it.

Knows tickets and blocks; not requests, and not what their KV is for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from diptych.errors import LayoutMismatch, TransferFailed
from diptych.hashing import GRANULE, granules_per_block
from diptych.types import (
    BlockId,
    KvParcel,
    KvTicket,
    PairAddress,
    RequestId,
    TransferId,
    TransferSample,
    WorkerId,
    WorkerSpec,
)
from kernels import granule_bytes
from workers.engine.engine import Engine
from workers.samples import TRANSFER_SAMPLES
from workers.transfer.buffers import Buffers
from workers.transfer.checksum import Verifier
from workers.transfer.link import MeetingPlace
from workers.transfer.pairs import ReceiverPairs, Source
from workers.transfer.states import State, Transfer

if TYPE_CHECKING:
    from torch import Tensor


class Inbound:
    """One hand-off on its way here. `progressed` when something moved, `failed(how, reason)` at most once."""

    def __init__(
        self,
        transfer: Transfer,
        sender: WorkerId,
        *,
        progressed: Callable[[], None],
        failed: Callable[[State, str], None],
    ) -> None:
        self.transfer: Final = transfer
        self.sender: Final = sender
        self.progressed: Final = progressed
        self.failed: Final = failed
        self.promise: Promise | None = None
        self.deadline = float("inf")
        self.computed_at: float | None = None
        """Since when the sender's engine has done its part: what is missing is the link's."""
        self.began_at: float | None = None
        """The first parcel's word."""
        self.landed_at: float | None = None
        """The latest parcel's landing."""

    @property
    def is_complete(self) -> bool:
        """Whether all of it landed."""
        return self.promise is not None and min(self.promise.landed) >= self.promise.ticket.count


@dataclass(slots=True, eq=False)
class Promise:
    """What a ticket's KV may land in."""

    ticket: KvTicket
    source: Source
    owner: str
    """Of the granted blocks, in the pool."""
    blocks: Sequence[BlockId]
    """Of the whole prompt, from its first granule on."""
    generations: dict[BlockId, int]
    """Of the granted ones."""
    landed: list[int] = field(default_factory=list[int])
    """Granules, of each leg."""
    nbytes: int = 0


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...


@dataclass(slots=True)
class ReceiverCounters:
    blocks: int = 0
    nbytes: int = 0
    corrupt_parcels: int = 0


class Receiver:
    """Of one worker. Everything but `expect` belongs to the engine's thread."""

    def __init__(
        self, engine: Engine, spec: WorkerSpec, clock: Clock, post: Callable[..., None], place: MeetingPlace
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._clock = clock
        self._post = post
        self._verifier = Verifier(spec.verify, spec.secret)
        self._per_block = granules_per_block(engine.limits.block_size)
        self._buffers = Buffers()
        self._inbound: dict[TransferId, Inbound] = {}
        self._sources: dict[WorkerId, Source | LayoutMismatch | TransferFailed] = {}
        self._pairs = ReceiverPairs(
            spec, place, post, self._buffers, landed=self.landed, void=self._pair_void, in_use=self._addresses_in_use
        )
        self._samples: deque[TransferSample] = deque(maxlen=TRANSFER_SAMPLES)
        self.counters: Final = ReceiverCounters()

    # ---- peers -----------------------------------------------------------------------------------------------

    def met(self, peer: WorkerId, source: Source | LayoutMismatch | TransferFailed) -> None:
        """How its KV comes here, or why it can't."""
        self._sources[peer] = source

    def source(self, peer: WorkerId) -> Source:
        """Raises LayoutMismatch or TransferFailed when nothing can come from it."""
        source = self._sources.get(peer, TransferFailed(f"{peer} was never met"))
        if not isinstance(source, Source):
            raise source
        return source

    def peer_left(self, peer: WorkerId, reason: str) -> None:
        """Nothing comes from it any more, and whoever takes its name gets new pairs."""
        for inbound in [each for each in self._inbound.values() if each.sender == peer]:
            self._fail(inbound, State.FAILED, reason)
        self._pairs.retire_sender(peer, reason)
        self._sources.pop(peer, None)

    # ---- a hand-off --------------------------------------------------------------------------------------------

    def begin(self, inbound: Inbound) -> None:
        """Its id is known from here on."""
        self._inbound[inbound.transfer.id] = inbound

    def promise(
        self,
        inbound: Inbound,
        request: RequestId,
        attempt: int,
        *,
        owner: str,
        blocks: Sequence[BlockId],
        first: int,
        granules: int,
    ) -> KvTicket:
        """A ticket for granules [first, granules) into `blocks`, of which `owner` was granted the new ones.

        Raises like `source`.
        """
        source, pool = self.source(inbound.sender), self._engine.pool
        ticket = KvTicket(
            transfer=inbound.transfer.id,
            request=request,
            attempt=attempt,
            receiver=self._spec.id,
            first=first,
            count=max(0, granules - first),
            lease_seconds=self._spec.lease_seconds,
            link=source.link,
            wire=source.wire,
            legs=source.legs,
            addresses=self._pairs.addresses(source),
        )
        inbound.promise = Promise(
            ticket=ticket,
            source=source,
            owner=owner,
            blocks=blocks,
            generations={block: pool.generation(block) for block in pool.blocks_of(owner)},
            landed=[0] * len(source.legs),
        )
        inbound.transfer.advance(State.GRANTED)
        self.touch(inbound)
        return ticket

    def touch(self, inbound: Inbound) -> None:
        """Something moved. The lease only runs while the next move is the link's or the peer's engine's."""
        if inbound.computed_at is not None or inbound.transfer.state is State.SENDING:
            inbound.deadline = self._clock.now() + self._spec.lease_seconds

    def computed(self, inbound: Inbound) -> None:
        """The sender's engine has done its part."""
        inbound.computed_at = self._clock.now()
        self.touch(inbound)

    def committed(self, inbound: Inbound) -> TransferSample | None:
        """It is in use: how fast its link was. None when nothing had to be sent."""
        promise, began, landed, computed = inbound.promise, inbound.began_at, inbound.landed_at, inbound.computed_at
        if promise is None or began is None or landed is None or computed is None:
            return None
        sample = TransferSample(
            sender=inbound.sender,
            link=promise.ticket.link,
            nbytes=promise.nbytes,
            seconds=landed - began,
            exposed_seconds=self._clock.now() - computed,
        )
        self._samples.append(sample)
        return sample

    def take_samples(self) -> tuple[TransferSample, ...]:
        """Of the latest hand-offs that were committed since; told once."""
        samples = tuple(self._samples)
        self._samples.clear()
        return samples

    def end(self, inbound: Inbound, *, in_doubt: bool = False, reason: str = "") -> None:
        """Nothing lands for it any more. `in_doubt`: whatever broke under it, its pairs are rebuilt."""
        self._inbound.pop(inbound.transfer.id, None)
        if in_doubt and inbound.promise:
            self._pairs.retire(inbound.promise.ticket.addresses, reason)

    def tick(self) -> None:
        """Leases that ran out."""
        now = self._clock.now()
        for inbound in [each for each in self._inbound.values() if each.deadline <= now]:
            self._doubt(inbound, State.EXPIRED, f"no progress for {self._spec.lease_seconds} s")

    def close(self) -> None:
        self._pairs.close()

    # ---- parcels -----------------------------------------------------------------------------------------------

    def expect(self, sender: WorkerId, parcel: KvParcel) -> None:
        """Receive it whatever became of its ticket: the pair's order must hold.

        For any thread: a receive that waited for a step would stall the sender.
        """
        self._post(self._announced, parcel)  # first: it must not overtake the landing
        self._pairs.expect(sender, parcel)

    def _announced(self, parcel: KvParcel) -> None:
        inbound = self._inbound.get(parcel.transfer)
        if inbound is None or inbound.transfer.state not in (State.GRANTED, State.SENDING):
            return  # it is over, or said twice
        inbound.transfer.advance(State.SENDING)
        if inbound.began_at is None:
            inbound.began_at = self._clock.now()
        self.touch(inbound)

    def landed(self, parcel: KvParcel, packed: Tensor | None) -> None:
        """A parcel's bytes are here, in a buffer that is the ticket's alone; None: they were given away over there."""
        self._take_in(parcel, packed)
        if packed is not None:
            self._buffers.give(packed)  # its link is done with it, and nothing of it is used any more

    def _take_in(self, parcel: KvParcel, packed: Tensor | None) -> None:
        inbound = self._inbound.get(parcel.transfer)
        promise = inbound.promise if inbound else None
        if inbound is None or promise is None:
            return  # its ticket is over: the bytes are dropped
        if packed is None:
            self._fail(inbound, State.FAILED, f"{inbound.sender} gave its blocks away")
            return
        problem = self._problem(promise, parcel, packed)
        if problem:
            self.counters.corrupt_parcels += 1
            self._fail(inbound, State.FAILED, problem)
            return
        self._land(promise, parcel, packed)
        inbound.landed_at = self._clock.now()
        self.touch(inbound)
        if inbound.is_complete:
            inbound.transfer.advance(State.LANDED)
        inbound.progressed()

    def _land(self, promise: Promise, parcel: KvParcel, packed: Tensor) -> None:
        ticket = promise.ticket
        leg = ticket.legs[parcel.leg]
        at = ticket.first + parcel.first
        self._engine.unpack(promise.blocks, at, parcel.count, leg, ticket.wire, packed)
        promise.landed[parcel.leg] += parcel.count
        promise.nbytes += parcel.nbytes
        self.counters.nbytes += parcel.nbytes
        if parcel.leg == 0:
            self.counters.blocks += -(-(at + parcel.count) // self._per_block) - -(-at // self._per_block)

    def _problem(self, promise: Promise, parcel: KvParcel, packed: Tensor) -> str | None:
        """Why this parcel must not land; None when it may."""
        ticket, layout, pool = promise.ticket, self._engine.layout, self._engine.pool
        if not 0 <= parcel.leg < len(ticket.legs):
            return f"parcel {parcel.sequence} is of leg {parcel.leg}, of which the ticket knows nothing"
        address = ticket.addresses[parcel.leg]
        if (parcel.pair, parcel.epoch) != (address.key, address.epoch):
            return f"parcel {parcel.sequence} came over another pair"
        if parcel.first != promise.landed[parcel.leg]:
            return f"parcel {parcel.sequence} came out of order"
        if parcel.count < 1 or parcel.first + parcel.count > ticket.count:
            return f"parcel {parcel.sequence} does not fit its ticket"
        heads = ticket.legs[parcel.leg].heads
        nbytes = parcel.count * granule_bytes(layout.layers, heads, layout.head_dim, ticket.wire)
        if packed.numel() != nbytes:
            return f"parcel {parcel.sequence} has {packed.numel()} bytes instead of {nbytes}"
        if pool.kind(promise.owner) != "ticket" or any(
            pool.generation(block) != generation for block, generation in promise.generations.items()
        ):
            return "its blocks were given away"
        if not self._verifier.agrees(parcel, packed):
            return f"parcel {parcel.sequence} is corrupt"
        return None

    # ---- the ends ------------------------------------------------------------------------------------------------

    def _doubt(self, inbound: Inbound, how: State, reason: str) -> None:
        promise = inbound.promise
        self._fail(inbound, how, reason)
        if promise:
            self._pairs.retire(promise.ticket.addresses, reason)

    def _fail(self, inbound: Inbound, how: State, reason: str) -> None:
        if self._inbound.pop(inbound.transfer.id, None) is not None:
            inbound.failed(how, reason)

    def _pair_void(self, address: PairAddress, reason: str) -> None:
        for inbound in list(self._inbound.values()):
            if inbound.promise and address in inbound.promise.ticket.addresses:
                self._fail(inbound, State.FAILED, reason)

    def _addresses_in_use(self) -> set[PairAddress]:
        promises = (inbound.promise for inbound in self._inbound.values())
        return {address for promise in promises if promise for address in promise.ticket.addresses}


def granules_of(tokens: int) -> int:
    """That hold so many tokens, the last one perhaps in part."""
    return -(-tokens // GRANULE)
