"""The sending side of hand-offs: ships what is complete, granted and not yet sent. Knows tickets and blocks only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diptych.hashing import granules_per_block
from diptych.types import BlockId, KvLeg, KvParcel, KvSource, KvTicket, PairAddress, WorkerId, WorkerSpec
from kernels import granule_bytes
from workers.engine.engine import Engine
from workers.peers import Effects
from workers.transfer.buffers import Buffers
from workers.transfer.pair import Shipment
from workers.transfer.pairs import READS, SenderPairs, is_of
from workers.transfer.states import State, Transfer

if TYPE_CHECKING:
    from torch import Tensor


class Outbound:
    """One hand-off on its way from here. `failed` and `moved` are called between steps."""

    def __init__(
        self, transfer: Transfer, receiver: WorkerId, *, moved: Callable[[], None], failed: Callable[[str], None]
    ) -> None:
        self.transfer: Final = transfer
        self.receiver: Final = receiver
        self.moved: Final = moved
        self.failed: Final = failed
        self.ticket: KvTicket | None = None
        self.next = 0
        """The first granule that was not shipped yet, of the whole prompt."""
        self.on_the_way = 0
        """Parcels handed to a link and not yet taken."""
        self.blocks_sent = 0
        self.bytes_sent = 0


@dataclass(slots=True)
class SenderCounters:
    blocks: int = 0
    nbytes: int = 0


class Sender:
    """Of one worker; all of it on the engine's thread."""

    def __init__(self, engine: Engine, spec: WorkerSpec, effects: Effects, post: Callable[..., None]) -> None:
        self._engine = engine
        self._spec = spec
        self._effects = effects
        self._post = post
        self._per_block = granules_per_block(engine.limits.block_size)
        self._outbound: dict[Transfer, Outbound] = {}
        self._buffers = Buffers()
        self._pairs = SenderPairs(spec, post, self._buffers, void=self._pair_void)
        self.counters: Final = SenderCounters()

    def accept(self, outbound: Outbound, ticket: KvTicket) -> None:
        """Its ticket is here."""
        if not all(is_of(address, self._spec) for address in ticket.addresses):
            # Read with our blocks' numbers, the arena of who was here before would give other content.
            outbound.failed(f"its ticket is for another incarnation of {self._spec.id}")
            return
        if any(self._pairs.is_stale(address) for address in ticket.addresses):
            outbound.failed("its pair was rebuilt")
            return
        outbound.ticket = ticket
        outbound.next = ticket.first
        outbound.transfer.advance(State.GRANTED)
        self._outbound[outbound.transfer] = outbound

    def ship(self, outbound: Outbound, blocks: Sequence[BlockId], ready: int) -> None:
        """One parcel on each leg of the granules before `ready` that were not shipped; `blocks` hold the prompt."""
        ticket = outbound.ticket
        if ticket is None or not outbound.transfer.live:
            return
        ready = min(ready, ticket.first + ticket.count)
        if outbound.next < ready:
            outbound.transfer.advance(State.PACKING)
            first, outbound.next = outbound.next, ready
            for leg in range(len(ticket.legs)):
                outbound.on_the_way += 1
                shipment = self._shipment(outbound, ticket, leg, blocks, first)
                self._pairs.ship(outbound.receiver, ticket.link, ticket.addresses[leg], shipment)
            outbound.transfer.advance(State.SENDING)
        self._landed_all(outbound)

    def end(self, outbound: Outbound) -> None:
        """Nothing more of it is shipped."""
        self._outbound.pop(outbound.transfer, None)

    def peer_left(self, peer: WorkerId, reason: str) -> None:
        """Nothing goes there any more."""
        self._pairs.retire_receiver(peer, reason)

    def close(self) -> None:
        self._pairs.close()

    # ---- a parcel --------------------------------------------------------------------------------------------------

    def _shipment(
        self, outbound: Outbound, ticket: KvTicket, leg: int, blocks: Sequence[BlockId], first: int
    ) -> Shipment:
        count, layout, heads = outbound.next - first, self._engine.layout, ticket.legs[leg]
        source = self._source(ticket, heads, blocks, first, count)
        parcel = KvParcel(
            transfer=ticket.transfer,
            leg=leg,
            pair=ticket.addresses[leg].key,
            epoch=ticket.addresses[leg].epoch,
            sequence=0,  # the pair numbers it when it leaves
            first=first - ticket.first,
            count=count,
            nbytes=count * granule_bytes(layout.layers, heads.heads, layout.head_dim, ticket.wire),
            source=source if ticket.link in READS else None,
        )
        receiver, me, address = outbound.receiver, self._spec.id, ticket.addresses[leg]

        def announce(parcel: KvParcel) -> None:
            self._effects.call(
                receiver, lambda peer: peer.expect(me, parcel), lambda answer: self._pairs.unheard(address, answer)
            )

        # Over links that read they lie where they are read; packed here only for a checksum.
        packed = None if ticket.link in READS else self._engine.pack(source, count, self._buffers.take(parcel.nbytes))

        def content() -> Tensor:
            return self._engine.pack(source, count) if packed is None else packed

        def sent(parcel: KvParcel) -> None:
            if packed is not None:
                self._buffers.give(packed)
            self._post(self._sent, outbound, parcel, len(source.blocks) if leg == 0 else 0)

        return Shipment(parcel=parcel, content=content, announce=announce, sent=sent)

    def _source(self, ticket: KvTicket, leg: KvLeg, blocks: Sequence[BlockId], first: int, count: int) -> KvSource:
        wanted = tuple(blocks[first // self._per_block : -(-(first + count) // self._per_block)])
        return KvSource(
            blocks=wanted,
            generations=tuple(self._engine.pool.generation(block) for block in wanted),
            skip=first % self._per_block,
            first_head=leg.first_head - self._engine.layout.heads.start,
            heads=leg.heads,
            wire=ticket.wire,
        )

    def _sent(self, outbound: Outbound, parcel: KvParcel, blocks: int) -> None:
        self.counters.blocks += blocks
        self.counters.nbytes += parcel.nbytes
        outbound.blocks_sent += blocks
        outbound.bytes_sent += parcel.nbytes
        outbound.on_the_way -= 1
        if outbound.transfer.live:
            outbound.moved()
            self._landed_all(outbound)

    def _landed_all(self, outbound: Outbound) -> None:
        ticket = outbound.ticket
        if ticket and not outbound.on_the_way and outbound.next >= ticket.first + ticket.count:
            outbound.transfer.advance(State.LANDED)

    def _pair_void(self, address: PairAddress, reason: str) -> None:
        for outbound in list(self._outbound.values()):
            if outbound.ticket and address in outbound.ticket.addresses:
                outbound.failed(reason)
