"""Every worker's link, each way: one piece after another at its rate. Knows no content.

A piece keeps the sender's way out and the receiver's way in busy for bytes / rate. Pieces begin in the order in which
they were asked for, but none waits for a way that its own doesn't take. A piece is there one latency after its end.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.simulate.clock import Clock
    from cluster.simulate.constants import Link
    from diptych.types import WorkerId

_PIECE_BYTES = 1 << 28


@dataclass(slots=True, eq=False)
class _Transfer:
    sender: WorkerId
    receiver: WorkerId
    left: int
    landed: Callable[[], None]


class Links:
    """Of one cluster; all links are alike."""

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self._out: set[WorkerId] = set()
        """Whose way out is busy."""
        self._in: set[WorkerId] = set()
        self._from: dict[WorkerId, dict[_Transfer, None]] = defaultdict(dict)
        """Waiting, in order."""
        self._to: dict[WorkerId, dict[_Transfer, None]] = defaultdict(dict)

    def send(self, sender: WorkerId, receiver: WorkerId, nbytes: int, landed: Callable[[], None]) -> None:
        """`landed` is called when the last byte is there."""
        transfer = _Transfer(sender, receiver, nbytes, landed)
        if sender in self._out or receiver in self._in:
            self._wait(transfer)
        else:
            self._begin(transfer)

    def _wait(self, transfer: _Transfer) -> None:
        self._from[transfer.sender][transfer] = None
        self._to[transfer.receiver][transfer] = None

    def _begin(self, transfer: _Transfer) -> None:
        self._out.add(transfer.sender)
        self._in.add(transfer.receiver)
        piece = min(transfer.left, _PIECE_BYTES)
        transfer.left -= piece
        self._clock.after(piece / self._link.bytes_per_second, lambda: self._end(transfer))

    def _end(self, transfer: _Transfer) -> None:
        self._out.remove(transfer.sender)
        self._in.remove(transfer.receiver)
        if transfer.left:
            self._wait(transfer)
        else:
            self._clock.after(self._link.latency_seconds, transfer.landed)
        self._begin_first(self._from[transfer.sender])
        self._begin_first(self._to[transfer.receiver])

    def _begin_first(self, waiting: dict[_Transfer, None]) -> None:
        for transfer in waiting:
            if transfer.sender not in self._out and transfer.receiver not in self._in:
                del self._from[transfer.sender][transfer], self._to[transfer.receiver][transfer]
                self._begin(transfer)
                return
