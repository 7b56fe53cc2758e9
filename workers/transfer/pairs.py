"""All pairs of one worker: opened for the first ticket, kept while used, closed when in doubt. Knows no request.

Everything here but `expect` belongs to the engine's thread. Whoever learns first that a pair is in
doubt closes it, which ends the other side's waits; the next ticket opens its successor, under the
next epoch, and whatever still speaks of the old one is void.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diptych.types import KvLeg, KvOffer, KvParcel, LinkKind, PairAddress, Wire, WorkerId, WorkerSpec
from workers.transfer.buffers import Buffers
from workers.transfer.checksum import Verifier
from workers.transfer.link import Link, MeetingPlace, PairLink
from workers.transfer.pair import ReceiverPair, SenderPair, Shipment
from workers.transfer.read_link import ReadLink, View

if TYPE_CHECKING:
    from torch import Tensor

    from diptych.errors import ServingError

MOST_PAIRS = 64
"""Each has a thread and, over gloo, two sockets: idle ones beyond this are closed."""
READS: frozenset[LinkKind] = frozenset({"loopback", "mapped", "nixl"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A worker that KV may come from, and how it comes."""

    offer: KvOffer
    link: LinkKind
    wire: Wire
    legs: tuple[KvLeg, ...]
    view: View | None
    """Its arena, for links that read."""


class ReceiverPairs:
    """Of what comes here."""

    def __init__(
        self,
        spec: WorkerSpec,
        place: MeetingPlace,
        post: Callable[..., None],
        buffers: Buffers,
        *,
        landed: Callable[[KvParcel, Tensor | None], None],
        void: Callable[[PairAddress, str], None],
        in_use: Callable[[], set[PairAddress]],
    ) -> None:
        """`landed` and `void` are called on the engine's thread; tickets over a void pair have failed."""
        self._spec = spec
        self._place = place
        self._post = post
        self._buffers = buffers
        self._landed = landed
        self._void = void
        self._in_use = in_use
        self._pairs: dict[str, ReceiverPair] = {}
        self._by_use: dict[str, None] = {}
        """Keys of pairs, the one used last is last. Apart from them: `expect` has to find every pair at any moment."""
        self._senders: dict[str, WorkerId] = {}
        self._epochs: dict[str, int] = {}

    def addresses(self, source: Source) -> tuple[PairAddress, ...]:
        """Where each leg's parcels are expected, until the pair is void."""
        return tuple(self._pair(source, leg).address for leg in source.legs)

    def expect(self, sender: WorkerId, parcel: KvParcel) -> None:
        """For any thread: receive it whatever became of its ticket, for the pair's order must hold."""
        pair = self._pairs.get(parcel.pair)
        if pair is None or self._senders.get(parcel.pair) != sender:
            return
        if pair.leg == parcel.leg and pair.address.epoch == parcel.epoch:
            pair.expect(parcel)

    def retire(self, addresses: Iterable[PairAddress], reason: str) -> None:
        """They are in doubt."""
        for address in addresses:
            pair = self._pairs.get(address.key)
            if pair is not None and pair.address == address:
                del self._pairs[address.key], self._by_use[address.key], self._senders[address.key]
                pair.close()
                self._void(address, reason)

    def retire_sender(self, sender: WorkerId, reason: str) -> None:
        """It is gone."""
        keys = [key for key, known in self._senders.items() if known == sender]
        self.retire([self._pairs[key].address for key in keys], reason)

    def close(self) -> None:
        """Every wait ends and every thread."""
        for pair in self._pairs.values():
            pair.close()
        for pair in self._pairs.values():
            pair.wait_closed(self._spec.lease_seconds)

    def _pair(self, source: Source, leg: KvLeg) -> ReceiverPair:
        key = _key(source.offer, leg, self._spec)
        pair = self._pairs.get(key)
        if pair is None:
            self._close_idle()
            pair = self._pairs[key] = self._open(source, leg, key)
        self._by_use.pop(key, None)
        self._by_use[key] = None
        return pair

    def _open(self, source: Source, leg: KvLeg, key: str) -> ReceiverPair:
        epoch = self._epochs[key] = self._epochs.get(key, 0) + 1
        address = PairAddress(host=self._place.host, port=self._place.port, key=key, epoch=epoch)
        self._senders[key] = source.offer.worker
        return self._end(source, leg, address)

    def _end(self, source: Source, leg: KvLeg, address: PairAddress) -> ReceiverPair:
        return ReceiverPair(
            _link(self._spec, source.link, "receiver", source.view, self._buffers),
            address,
            source.legs.index(leg),
            self._place,
            lambda parcel, packed: self._post(self._landed, parcel, packed),
            lambda error: self._post(self.retire, (address,), str(error)),
        )

    def _close_idle(self) -> None:
        if len(self._pairs) < MOST_PAIRS:
            return
        used = self._in_use()
        for address in [self._pairs[key].address for key in self._by_use]:
            if address not in used:
                self.retire((address,), "it was idle for longest")
                return


class SenderPairs:
    """Of what leaves here."""

    def __init__(
        self,
        spec: WorkerSpec,
        post: Callable[..., None],
        buffers: Buffers,
        *,
        void: Callable[[PairAddress, str], None],
    ) -> None:
        self._spec = spec
        self._post = post
        self._buffers = buffers
        self._void = void
        self._verifier = Verifier(spec.verify, spec.secret)
        self._pairs: dict[str, SenderPair] = {}
        self._receivers: dict[str, WorkerId] = {}
        self._over: dict[str, int] = {}
        """Epochs up to which a key's pairs are void."""

    def ship(self, receiver: WorkerId, link: LinkKind, address: PairAddress, shipment: Shipment) -> None:
        """Over the pair at this address, which is opened first if need be."""
        pair = self._pairs.get(address.key)
        if pair is not None and pair.address != address:
            self.retire((pair.address,), "its pair was rebuilt")
            pair = None
        if pair is None:
            pair = self._pairs[address.key] = self._end(link, address)
            self._receivers[address.key] = receiver
        pair.ship(shipment)

    def _end(self, link: LinkKind, address: PairAddress) -> SenderPair:
        return SenderPair(
            _link(self._spec, link, "sender", None, self._buffers),
            address,
            self._verifier,
            lambda error: self._post(self.retire, (address,), str(error)),
        )

    def is_stale(self, address: PairAddress) -> bool:
        """Whether it was closed here, or a later ticket of the same receiver already opened a later pair.

        The receiver may not know yet, and counts parcels where this side left off.
        """
        pair = self._pairs.get(address.key)
        newest = pair.address.epoch if pair is not None else 0
        return address.epoch < newest or address.epoch <= self._over.get(address.key, 0)

    def unheard(self, address: PairAddress, answer: ServingError | None) -> None:
        """What came of announcing a parcel. If nobody receives it, what is sent after it would wait for it."""
        if answer is not None:
            self.retire((address,), str(answer))

    def retire(self, addresses: Iterable[PairAddress], reason: str) -> None:
        """They are in doubt: nothing must open them again."""
        for address in addresses:
            pair = self._pairs.get(address.key)
            if pair is not None and pair.address == address:
                del self._pairs[address.key], self._receivers[address.key]
                self._over[address.key] = address.epoch
                pair.close()
                self._void(address, reason)

    def retire_receiver(self, receiver: WorkerId, reason: str) -> None:
        """It is gone."""
        keys = [key for key, known in self._receivers.items() if known == receiver]
        self.retire([self._pairs[key].address for key in keys], reason)

    def close(self) -> None:
        """Every wait ends and every thread."""
        for pair in self._pairs.values():
            pair.close()
        for pair in self._pairs.values():
            pair.wait_closed(self._spec.lease_seconds)


def is_of(address: PairAddress, sender: WorkerSpec) -> bool:
    """Whether that incarnation of a worker is the pair's sender."""
    return address.key.startswith(f"{sender.id}.{sender.epoch}/")


def _key(offer: KvOffer, leg: KvLeg, receiver: WorkerSpec) -> str:
    return f"{offer.worker}.{offer.epoch}/{leg.source}>{receiver.id}.{receiver.epoch}/{leg.target}"


def _link(spec: WorkerSpec, kind: LinkKind, side: str, view: View | None, buffers: Buffers) -> Link:
    if kind in READS:

        def enter() -> View:
            assert view is not None, "a link that reads was chosen without anything to read"
            return view

        return ReadLink(enter, buffers)
    end = "sender" if side == "sender" else "receiver"
    return PairLink(kind, end, spec.host, torch.device(spec.device), spec.lease_seconds, buffers)
