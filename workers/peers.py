"""What workers say to each other about a request. Knows neither Ray nor the engine.

D → P: run, is_pending, committed, withdraw.   P → D: grant, is_granting, transfer_failed.
Anyone: offer, expect, lend, returned.
Every one is idempotent, and late ones about a request that is over change nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from diptych.errors import ServingError
from diptych.types import (
    BlockHash,
    FrontId,
    KvOffer,
    KvParcel,
    KvTicket,
    Outgoing,
    PrefillDone,
    PrefillOrder,
    RequestId,
    TransferId,
    WorkerId,
)

T = TypeVar("T")


class Peer(Protocol):
    """Another worker."""

    async def offer(self) -> KvOffer:
        """What it is to those who may receive its KV."""
        ...

    async def run(self, order: PrefillOrder) -> PrefillDone:
        """Compute the prompt, hand its KV over, send the first token to the front."""
        ...

    async def is_pending(self, request: RequestId, attempt: int) -> bool:
        """Whether the order is still known and the engine alive: asked while waiting for `run`."""
        ...

    async def committed(self, transfer: TransferId) -> None:
        """The KV is in use: the sender's blocks can go."""
        ...

    async def withdraw(self, request: RequestId, attempt: int) -> None:
        """The order is void: cancelled, or computed elsewhere."""
        ...

    async def grant(self, request: RequestId, attempt: int) -> KvTicket | None:
        """Room for the prompt's KV, as soon as there is; None when the request is over."""
        ...

    async def is_granting(self, request: RequestId, attempt: int) -> bool:
        """Whether a grant still waits for room and the engine is alive: asked while waiting for it, which renews
        the lease of whoever waits."""
        ...

    async def expect(self, sender: WorkerId, parcel: KvParcel) -> None:
        """A parcel is on the link."""
        ...

    async def lend(self, ticket: KvTicket, names: tuple[BlockHash, ...]) -> int:
        """Cached granules by name, into the ticket: how many of those it wants will come."""
        ...

    async def returned(self, transfer: TransferId) -> None:
        """What was lent is copied, or not wanted any more."""
        ...

    async def transfer_failed(self, request: RequestId, attempt: int, reason: str) -> None:
        """No more KV will come."""
        ...


class Effects(Protocol):
    """What a role may cause, from the engine's thread, without waiting. Answers come back to it."""

    def emit(self, front: FrontId, outgoing: Outgoing) -> None:
        """On its way with the others of this step."""
        ...

    def call(
        self,
        peer: WorkerId,
        what: Callable[[Peer], Awaitable[T]],
        then: Callable[[T | ServingError], None] | None = None,
    ) -> None:
        """A short call, bounded by the lease. `then` gets the answer or why there is none."""
        ...

    def wait(
        self,
        peer: WorkerId,
        what: Callable[[Peer], Awaitable[T]],
        is_pending: Callable[[Peer], Awaitable[bool]],
        then: Callable[[T | ServingError], None],
    ) -> None:
        """A call that may take long, for as long as the peer says that it is pending."""
        ...

    def now(self) -> float:
        """Monotonic seconds."""
        ...
