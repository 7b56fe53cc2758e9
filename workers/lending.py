"""Cached blocks for another worker: lent while it copies them, computed by nobody again.

Runs on the engine's thread. What a borrower asks for by name it gets as far as it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from diptych.hashing import block_hashes, granules_per_block
from diptych.types import BlockHash, KvTicket, TransferId, WorkerId, WorkerSpec
from workers.engine.engine import Engine
from workers.peers import Effects
from workers.transfer.sending import Outbound, Sender
from workers.transfer.states import State, Tally, Transfer


@dataclass(slots=True, eq=False)
class _Loan:
    outbound: Outbound
    deadline: float


class Lender:
    """Of one worker."""

    def __init__(self, engine: Engine, spec: WorkerSpec, effects: Effects, sender: Sender) -> None:
        self._engine = engine
        self._spec = spec
        self._effects = effects
        self._sender = sender
        self._loans: dict[TransferId, _Loan] = {}
        self.tally: Final = Tally()

    def lend(self, ticket: KvTicket, names: Sequence[BlockHash], reply: Callable[[int], None]) -> None:
        """`names` of the prompt's granules from its first on; answers how many of the ticket's will come."""
        owner, pool = ticket.transfer, self._engine.pool
        if owner in self._loans:
            reply(0)  # asked twice: the first one counts
            return
        size = self._engine.limits.block_size
        blocks = pool.acquire(block_hashes(names, size), owner)
        count = min(ticket.count, len(blocks) * granules_per_block(size) - ticket.first)
        if count <= 0:
            pool.release(owner)
            reply(0)
            return
        pool.lend(owner)
        outbound = Outbound(
            Transfer(ticket.transfer, self.tally),
            ticket.receiver,
            moved=lambda: self._touch(ticket.transfer),
            failed=lambda reason: self._end(ticket.transfer, State.FAILED, reason),
        )
        self._loans[ticket.transfer] = _Loan(outbound, self._effects.now() + self._spec.lease_seconds)
        self._sender.accept(outbound, replace(ticket, count=count))
        reply(count if outbound.transfer.live else 0)
        self._sender.ship(outbound, blocks, ticket.first + count)

    def returned(self, transfer: TransferId) -> None:
        """The borrower has its copy, or wants it no more. Idempotent."""
        loan = self._loans.get(transfer)
        if loan is None:
            return
        # It only returns what it has, or has given up: that our link thread has not said so is a matter of time.
        if loan.outbound.transfer.state is State.LANDED:
            loan.outbound.transfer.advance(State.COMMITTED)
            self._end(transfer, State.RELEASED)
        else:
            self._end(transfer, State.ABORTED, "returned")

    def peer_left(self, peer: WorkerId, reason: str) -> None:
        """It died with what it borrowed."""
        for transfer in [name for name, loan in self._loans.items() if loan.outbound.receiver == peer]:
            self._end(transfer, State.FAILED, reason)

    def tick(self) -> None:
        """Leases that ran out."""
        now = self._effects.now()
        for transfer in [name for name, loan in self._loans.items() if loan.deadline <= now]:
            self._end(transfer, State.EXPIRED, f"not returned within {self._spec.lease_seconds} s")

    def owners(self) -> set[str]:
        """Who may hold blocks on behalf of borrowers."""
        return set(self._loans)

    def _touch(self, transfer: TransferId) -> None:
        if loan := self._loans.get(transfer):
            loan.deadline = self._effects.now() + self._spec.lease_seconds

    def _end(self, transfer: TransferId, how: State, reason: str = "") -> None:
        loan = self._loans.pop(transfer, None)
        if loan is None or not loan.outbound.transfer.end(how, reason):
            return
        self._sender.end(loan.outbound)
        self._engine.pool.release(transfer)
