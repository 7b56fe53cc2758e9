"""A prompt's prefix from another worker's cache into ours, before the rest is computed here.

Runs on the engine's thread. The blocks land under a ticket like any hand-off's; then they are named
and left in the cache, where the prompt finds them. Whatever goes wrong, the prompt is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from diptych.errors import LayoutMismatch, ServingError, TransferFailed
from diptych.hashing import block_hashes, granules_per_block
from diptych.types import BlockHash, Request, RequestId, TransferId, WorkerId, WorkerSpec
from workers.engine.engine import Engine
from workers.peers import Effects
from workers.transfer.receiving import Inbound, Receiver
from workers.transfer.states import State, Tally, Transfer

Key = tuple[RequestId, int]


@dataclass(slots=True, eq=False)
class _Loan:
    inbound: Inbound
    names: tuple[BlockHash, ...]
    """Of all our blocks of the prefix."""
    had: int
    """How many of them were here already."""
    then: Callable[[], None]
    agreed: bool = False
    """The lender said how much will come."""


class Borrower:
    """Of one worker."""

    def __init__(self, engine: Engine, spec: WorkerSpec, effects: Effects, receiver: Receiver) -> None:
        self._engine = engine
        self._spec = spec
        self._effects = effects
        self._receiver = receiver
        self._loans: dict[Key, _Loan] = {}
        self.tally: Final = Tally()
        self.blocks_borrowed = 0

    def borrow(self, request: Request, attempt: int, lender: WorkerId, then: Callable[[], None]) -> None:
        """`then` is called when the prefix is here, or will not come; not if it is cancelled before."""
        pool, size = self._engine.pool, self._engine.limits.block_size
        names = block_hashes(request.granules, size)[: (len(request.tokens) - 1) // size]
        had = pool.match(names)
        transfer = TransferId(f"{request.id}#{attempt}<{lender}>{self._spec.id}")
        scored = request.params.prompt_logprobs is not None and not request.said
        if scored or had >= len(names) or (request.id, attempt) in self._loans:
            then()
            return
        # Held, or they could be evicted for what is to follow them.
        blocks = pool.acquire(names[:had], f"{transfer}/had")
        granted = pool.grant(len(names) - had, transfer)
        if granted is None:
            pool.release(f"{transfer}/had")
            then()
            return
        inbound = Inbound(
            Transfer(transfer, self.tally),
            lender,
            progressed=lambda: self._progressed(key),
            failed=lambda how, reason: self._failed(key, how, reason),
        )
        key = (request.id, attempt)
        loan = self._loans[key] = _Loan(inbound, names, had, then)
        self._receiver.begin(inbound)
        self._receiver.computed(inbound)  # long ago: all of the wait is the link's
        per_block = granules_per_block(size)
        try:
            ticket = self._receiver.promise(
                inbound,
                request.id,
                attempt,
                owner=transfer,
                blocks=(*blocks, *granted),
                first=had * per_block,
                granules=len(names) * per_block,
            )
        except (LayoutMismatch, TransferFailed) as error:
            self._failed(key, State.FAILED, str(error))
            return
        wanted = request.granules[: len(names) * per_block]
        self._effects.call(lender, lambda peer: peer.lend(ticket, wanted), lambda count: self._agreed(key, loan, count))

    def cancel(self, request: RequestId, attempt: int) -> None:
        """Idempotent."""
        if (request, attempt) in self._loans:
            self._end((request, attempt), State.ABORTED, "cancelled")

    def owners(self) -> set[str]:
        """Who may hold blocks for what is on its way."""
        names = [loan.inbound.transfer.id for loan in self._loans.values()]
        return {owner for name in names for owner in (name, f"{name}/had")}

    # ---- inside ------------------------------------------------------------------------------------------------

    def _agreed(self, key: Key, loan: _Loan, count: int | ServingError) -> None:
        if self._loans.get(key) is not loan:
            return
        promise = loan.inbound.promise
        assert promise is not None, "it was asked for with a ticket"
        if isinstance(count, ServingError) or count <= 0:
            self._failed(key, State.FAILED, str(count) if count else "it is not there any more")
            return
        promise.ticket = replace(promise.ticket, count=min(count, promise.ticket.count))
        loan.agreed = True
        self._progressed(key)

    def _progressed(self, key: Key) -> None:
        loan = self._loans.get(key)
        if loan is None or not loan.agreed or not loan.inbound.is_complete:
            return
        promise, pool, transfer = loan.inbound.promise, self._engine.pool, loan.inbound.transfer
        assert promise is not None, "only what was promised can be complete"
        whole = loan.had + promise.ticket.count // granules_per_block(self._engine.limits.block_size)
        transfer.advance(State.LANDED)
        transfer.advance(State.COMMITTED)
        blocks = pool.commit(transfer.id, f"{transfer.id}/landed")
        for block, name in zip(blocks, loan.names[loan.had : whole], strict=False):
            pool.name(block, name, f"{transfer.id}/landed")
        pool.release(f"{transfer.id}/landed")
        self.blocks_borrowed += whole - loan.had
        self._receiver.committed(loan.inbound)
        self._end(key, State.RELEASED)
        loan.then()

    def _failed(self, key: Key, how: State, reason: str) -> None:
        loan = self._loans.get(key)
        if loan is not None:
            self._end(key, how, reason)
            loan.then()

    def _end(self, key: Key, how: State, reason: str = "") -> None:
        loan = self._loans.pop(key)
        transfer = loan.inbound.transfer
        transfer.end(how, reason)
        self._receiver.end(loan.inbound)
        for owner in (transfer.id, f"{transfer.id}/had"):
            self._engine.pool.release(owner)
        self._effects.call(loan.inbound.sender, lambda peer: peer.returned(transfer.id))
