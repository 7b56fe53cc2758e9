"""A pair's one thread: opens the link for the first parcel, then moves them in order. Knows no requests.

The engine's thread hands buffers in and is called back; it never waits for a link.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from diptych.errors import TransferFailed
from diptych.types import KvParcel, PairAddress
from workers.transfer.checksum import Verifier
from workers.transfer.link import Link, MeetingPlace

if TYPE_CHECKING:
    from torch import Tensor

Broken = Callable[[TransferFailed | OSError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """A parcel on its way to the link thread; `announce` tells the receiver to expect it."""

    parcel: KvParcel
    content: Callable[[], Tensor]
    """[nbytes] uint8. Asked for where it is needed: links that read send nothing."""
    announce: Callable[[KvParcel], None]
    sent: Callable[[KvParcel], None]


class SenderPair:
    """The sending end. `on_broken` is called once, from the link thread, and ends the pair."""

    def __init__(self, link: Link, address: PairAddress, verifier: Verifier, on_broken: Broken) -> None:
        self.address: Final = address
        self._link = link
        self._verifier = verifier
        self._on_broken = on_broken
        self._queue: queue.SimpleQueue[Shipment | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"send-{address.key}", daemon=True)
        self._thread.start()

    def ship(self, shipment: Shipment) -> None:
        self._queue.put(shipment)

    def close(self) -> None:
        """Idempotent; a send under way ends at once."""
        self._link.close()
        self._queue.put(None)

    def wait_closed(self, timeout_seconds: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        sequence = 0
        try:
            while (shipment := self._queue.get()) is not None:
                parcel = replace(shipment.parcel, sequence=sequence)
                parcel = replace(parcel, checksum=self._verifier.checksum(parcel, shipment.content))
                sequence += 1
                # Announced before it is sent: the receiver posts its receive on our word, never on a guess.
                shipment.announce(parcel)
                if not parcel.sequence:
                    self._link.open(self.address)
                self._link.send(shipment.content)
                shipment.sent(parcel)
        except (TransferFailed, OSError) as error:  # OSError: too many open files
            self._link.close()
            self._on_broken(error)


class ReceiverPair:
    """The receiving end: parcels are received in the order of their numbers, however announced."""

    def __init__(
        self,
        link: Link,
        address: PairAddress,
        leg: int,
        place: MeetingPlace,
        on_landed: Callable[[KvParcel, Tensor | None], None],
        on_broken: Broken,
    ) -> None:
        self.address: Final = address
        self.leg: Final = leg
        self._link = link
        self._place = place
        self._on_landed = on_landed
        self._on_broken = on_broken
        self._announced: queue.SimpleQueue[KvParcel | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"receive-{address.key}", daemon=True)
        self._thread.start()

    def expect(self, parcel: KvParcel) -> None:
        """The sender announced it. Any thread may call."""
        self._announced.put(parcel)

    def close(self) -> None:
        """Idempotent; a receive under way ends at once."""
        self._link.close()
        self._announced.put(None)

    def wait_closed(self, timeout_seconds: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        announced: dict[int, KvParcel] = {}
        expected = 0
        try:
            while (parcel := self._announced.get()) is not None:
                # Not before there is something to receive: a ticket may end with nothing to send.
                if not announced and not expected:
                    self._link.open(self.address, self._place)
                announced[parcel.sequence] = parcel
                while (parcel := announced.pop(expected, None)) is not None:
                    self._on_landed(parcel, self._link.receive(parcel))
                    expected += 1
        except (TransferFailed, OSError) as error:  # OSError: too many open files
            self._link.close()
            self._on_broken(error)
