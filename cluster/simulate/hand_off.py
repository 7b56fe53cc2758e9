"""A prompt's KV on its way from one virtual worker to another. Knows no policy and no other request.

HandOff   prefill computes, decode lacks: each finished chunk is sent while the next computes
Borrowing a prefix from a third worker's cache, before the rest is computed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.types import TransferSample

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.simulate.asked import VirtualSequence
    from cluster.simulate.clock import Clock
    from cluster.simulate.links import Links
    from cluster.simulate.worker import VirtualWorker


@dataclass(frozen=True, slots=True)
class Wires:
    """What KV travels over."""

    clock: Clock
    links: Links
    bytes_per_token: int


@dataclass(slots=True, eq=False, kw_only=True)
class HandOff:
    """One request's. `committed` is called once, when all is there and the first token is known."""

    wires: Wires
    sender: VirtualWorker
    sending: VirtualSequence
    receiver: VirtualWorker
    receiving: VirtualSequence
    committed: Callable[[HandOff], None]
    granted: bool = False
    next_token: int = 0
    """The first that is neither there already nor on its way."""
    on_the_way: int = 0
    computed_at: float | None = None
    """When prefill had the first token."""
    sent_bytes: int = 0
    began: float = 0.0
    over: bool = False

    def room_is_there(self) -> None:
        """Decode has blocks for what it lacks."""
        self.granted, self.next_token = True, self.receiving.computed
        self.send_ready()

    def send_ready(self) -> None:
        """What is computed and not sent yet: whole blocks, and the rest of the last one at the end."""
        sending = self.sending
        whole = self.computed_at is not None
        ready = sending.prompt_length if whole else sending.full_blocks * sending.block_size
        if not self.granted or self.over:
            return
        if ready > self.next_token:
            self._send(ready - self.next_token)
            self.next_token = ready
        elif whole and not self.on_the_way:
            self._commit()

    def _send(self, tokens: int) -> None:
        nbytes = tokens * self.wires.bytes_per_token
        self.began = self.began or self.wires.clock.now
        self.sent_bytes += nbytes
        self.on_the_way += 1
        self.wires.links.send(self.sender.id, self.receiver.id, nbytes, self._landed)

    def _landed(self) -> None:
        self.on_the_way -= 1
        if not self.over and not self.on_the_way and self.computed_at is not None:
            self.send_ready()

    def _commit(self) -> None:
        self.over = True
        if self.sent_bytes:
            now, computed = self.wires.clock.now, self.computed_at
            assert computed is not None, "committed before it was computed"
            self.receiver.landed(
                TransferSample(
                    sender=self.sender.id,
                    link="nccl",
                    nbytes=self.sent_bytes,
                    seconds=now - self.began,
                    exposed_seconds=now - computed,
                )
            )
        self.committed(self)


@dataclass(slots=True, eq=False, kw_only=True)
class Borrowing:
    """The prefix that `sequence` will find in `receiver`'s cache once it came from `holder`'s."""

    wires: Wires
    holder: VirtualWorker
    receiver: VirtualWorker
    sequence: VirtualSequence
    done: Callable[[], None]
    """Called once, whether anything was borrowed or not; not after a death of the receiver."""
    tokens: int = 0

    def begin(self) -> None:
        """Takes room for what the holder has more; nothing to gain or no room is done at once."""
        names = self.sequence.reusable_names()
        here, there = self.receiver.pool.match(names), self.holder.pool.match(names)
        if not self.holder.alive or there <= here or not self._reserve(here, there):
            self.done()
            return
        self.tokens = (there - here) * self.sequence.block_size
        nbytes = self.tokens * self.wires.bytes_per_token
        self.wires.links.send(self.holder.id, self.receiver.id, nbytes, self._landed)

    def _reserve(self, here: int, there: int) -> bool:
        names = self.sequence.reusable_names()
        kept = self.receiver.pool.acquire(names[:here], self._name("keep"))
        assert len(kept) == here, "the prefix went while nothing happened"
        if self.receiver.pool.grant(there - here, self._name("borrow")) is None:
            self.receiver.pool.release(self._name("keep"))
            return False
        self.holder.pool.acquire(names[:there], self._name("loan"))
        self.holder.pool.lend(self._name("loan"))
        return True

    def _landed(self) -> None:
        if self.holder.alive:
            self.holder.pool.release(self._name("loan"))
            self.holder.wake()
        if not self.receiver.alive:
            return
        pool, borrow = self.receiver.pool, self._name("borrow")
        if self.holder.alive:
            blocks = pool.commit(borrow, borrow)
            names = self.sequence.reusable_names()
            first = len(pool.blocks_of(self._name("keep")))
            for place, block in enumerate(blocks, first):
                pool.name(block, names[place], borrow)
        pool.release(borrow)
        pool.release(self._name("keep"))
        self.done()

    def _name(self, part: str) -> str:
        return f"{self.sequence.owner}/{part}"
