"""A link that reads: the receiver copies the sender's leased blocks out of the sender's own arena.

Loopback within a process, a mapping between two on one machine, NIXL between any two. The sender does nothing and
nobody writes into another's memory: a process that was stopped in the middle of a copy, and goes on
after its lease, harms nobody. As with a seqlock the copy counts if the blocks' generations are,
after it, what the sender promised: they change before anything else is written there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from diptych.errors import TransferFailed
from diptych.types import BlockId, KvParcel, KvSource, PairAddress
from workers.transfer.buffers import Buffers
from workers.transfer.link import MeetingPlace

if TYPE_CHECKING:
    from torch import Tensor


class View(Protocol):
    """A sender's arena, as a receiver sees it. Both raise TransferFailed when the sender can't be reached."""

    def current(self, blocks: Sequence[BlockId]) -> tuple[int, ...] | None:
        """Generations, now; None when there is no such block."""
        ...

    def read(self, source: KvSource, count: int, out: Tensor) -> Tensor:
        """A copy, as it would be packed for a wire: [bytes] uint8, in `out` if it can be."""
        ...


class ReadLink:
    """Both ends of it: only the receiver's does anything."""

    def __init__(self, enter: Callable[[], View], buffers: Buffers | None = None) -> None:
        """`enter` raises TransferFailed; it is called by the receiver alone, once."""
        self._enter = enter
        self._buffers = buffers or Buffers()
        self._view: View | None = None
        self._closed = False

    def open(self, address: PairAddress, place: MeetingPlace | None = None) -> None:
        """Only a receiver has a meeting place."""
        if place is not None:
            self._view = self._enter()
            if self._closed:
                self._view = None
        del address

    def send(self, content: Callable[[], Tensor]) -> None:
        """It lies where it is read."""

    def receive(self, parcel: KvParcel) -> Tensor | None:
        """The parcel's granules: [nbytes] uint8 on the arena's device; None when they are not there any more."""
        view = self._view  # `close` may take it away under a copy
        if self._closed or view is None:
            raise TransferFailed("the pair is closed")
        source = parcel.source
        if source is None:
            raise TransferFailed(f"parcel {parcel.sequence} does not say where it lies")
        if not is_whole(source, view):
            return None
        packed = view.read(source, parcel.count, self._buffers.take(parcel.nbytes))
        return packed if is_whole(source, view) else None

    def close(self) -> None:
        """Idempotent, from any thread. A copy under way ends by itself."""
        self._closed = True
        self._view = None


def is_whole(source: KvSource, view: View) -> bool:
    """Whether the blocks have not been taken for other content."""
    return view.current(source.blocks) == source.generations
