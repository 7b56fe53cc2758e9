"""A link that reads: the receiver copies the sender's leased blocks out of the sender's own arena.

Loopback within a process, a mapping between two on one machine. The sender does nothing and
nobody writes into another's memory: a process that was stopped in the middle of a copy, and goes on
after its lease, harms nobody. As with a seqlock the copy counts if the blocks' generations are,
after it, what the sender promised: they change before anything else is written there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from diptych.errors import TransferFailed
from diptych.types import KvParcel, KvSource, PairAddress
from workers.engine.kv_memory import read_granules
from workers.transfer.link import MeetingPlace
from workers.transfer.shared_arena import ArenaView

if TYPE_CHECKING:
    from torch import Tensor


class ReadLink:
    """Both ends of it: only the receiver's does anything."""

    def __init__(self, enter: Callable[[], ArenaView]) -> None:
        """`enter` raises TransferFailed; it is called by the receiver alone, once."""
        self._enter = enter
        self._view: ArenaView | None = None
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
        packed = read_granules(view.arena, source, parcel.count)
        if packed.is_cuda:
            torch.cuda.current_stream(packed.device).synchronize()
        return packed if is_whole(source, view) else None

    def close(self) -> None:
        """Idempotent, from any thread. A copy under way ends by itself."""
        self._closed = True
        self._view = None


def is_whole(source: KvSource, view: ArenaView) -> bool:
    return all(
        block < len(view.generations) and view.generations[block] == generation
        for block, generation in zip(source.blocks, source.generations, strict=True)
    )
