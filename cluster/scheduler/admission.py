"""Who waits for a place, who is next, and who is told at once that it would wait too long.

Three classes by the sign of a request's priority: high (below 0), normal, low. The order between
them is strict but for a least share of each lower one; within a class see `class_queue`. Queues are
bounded, and a tenant's part of one shrinks as it fills, so there is room for those who come later.
Pure: knows no worker and no clock; the scheduler asks `next` when there is room to place somebody.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from cluster.scheduler.class_queue import ClassQueue, Waiting
from cluster.scheduler.drain_rate import DrainRate
from cluster.scheduler.fairness import LeastShare
from cluster.scheduler.ranked import Ranked
from diptych.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cluster.scheduler.costs import RequestShape
    from diptych.types import RequestId

CLASSES: Final = ("high", "normal", "low")
Reason: TypeAlias = Literal["queue full", "tenant's part full", "deadline", "ttft"]

_MARGIN = 1.25
"""Of the time from placement to first token: who is placed at the last moment would else be late by any error."""
_ROOM_FACTOR = 8
"""A tenant may have so many times as many waiting as there is room left (Choudhury and Hahne, Dynamic
queue length thresholds, 1998): alone it fills 8/9 of a queue, and who comes next still finds room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPolicy:
    """By class where there are three, in the order of CLASSES."""

    queue: tuple[int, int, int] = (1024, 1024, 1024)
    """Requests that may wait."""
    least_share: tuple[float, float, float] = (0.0, 0.1, 0.05)
    """Of all work, for those who would else starve behind more important ones."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of tenants; 1 for those not named."""
    ttft_seconds: float = 2.0
    """The first token's time, for a request that says none ..."""
    ttft_seconds_per_token: float = 0.00015
    """... and what each prompt token adds to it."""
    give_up: float | None = None
    """Refuse who would wait more than so many times its first token's time; None never does."""

    def ttft(self, shape: RequestShape) -> float:
        """Its own wish, or the default."""
        if shape.ttft_seconds is not None:
            return shape.ttft_seconds
        return self.ttft_seconds + self.ttft_seconds_per_token * shape.prompt_tokens


class Turn(NamedTuple):
    """Who is next."""

    waiting: Waiting
    priority: int
    """As what: its own, or that of the more important one before whom it goes by its class's least share."""


class ClassCounts(NamedTuple):
    """What happened to one class."""

    length: int
    oldest_seconds: float
    released: int
    waited_seconds: float
    """Sum over those released."""
    rejected: Mapping[Reason, int]


def rank_of(priority: int) -> int:
    """The class of a priority; lower is served first."""
    return 0 if priority < 0 else 1 if priority == 0 else 2


class Admission:
    """The queues of one scheduler. Operations are O(log n)."""

    def __init__(self, policy: AdmissionPolicy) -> None:
        self._policy = policy
        self._queues = tuple(ClassQueue(policy.weights) for _ in CLASSES)
        self._shares = tuple(LeastShare(share) for share in policy.least_share)
        self._waiting: dict[RequestId, Waiting] = {}
        self._deadlines: Ranked[RequestId] = Ranked()
        self._arrivals: tuple[Ranked[RequestId], ...] = tuple(Ranked() for _ in CLASSES)
        self._drain = DrainRate()
        self._released = [0] * len(CLASSES)
        self._waited_seconds = [0.0] * len(CLASSES)
        self._rejected: tuple[Counter[Reason], ...] = tuple(Counter[Reason]() for _ in CLASSES)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._waiting

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    # ---- in ---------------------------------------------------------------------------------------------

    def add(self, shape: RequestShape, seconds: float, now: float, *, assumed: float, ahead: float) -> None:
        """It waits from now on. Raises Overloaded when it would in vain, or has no room.

        `seconds`: predicted, to compute its prompt; `assumed`: such seconds that all workers together
        are believed to work off in a second, until that was seen; `ahead`: what is before it at a
        worker, once it is placed.
        """
        rank = rank_of(shape.priority)
        self._check_room(shape, rank, now, assumed)
        placed = _MARGIN * (ahead + seconds)
        self._check_time(shape, rank, placed, now, assumed)
        waiting = Waiting(
            shape=shape,
            rank=rank,
            seconds=seconds,
            arrived=now,
            start_by=now + self._policy.ttft(shape) - placed,
            deadline=None if shape.deadline_seconds is None else now + shape.deadline_seconds,
        )
        if not self._waiting:
            self._drain.began(now)
        self._waiting[shape.request] = waiting
        self._queues[rank].add(waiting)
        self._arrivals[rank].put(shape.request, now)
        if waiting.deadline is not None:
            self._deadlines.put(shape.request, waiting.deadline)

    def wait_seconds(self, shape: RequestShape, now: float, assumed: float) -> float:
        """Predicted, from now until its turn."""
        rank = rank_of(shape.priority)
        before = sum(queue.seconds for queue in self._queues[:rank])
        before += self._queues[rank].seconds_before(shape.tenant)
        return self._drain.seconds_for(before, now, assumed)

    # ---- out --------------------------------------------------------------------------------------------

    def next(self, now: float) -> Turn | None:
        """Who is to be placed next. Who can't be placed holds up who comes after, or large ones would starve."""
        ranks = [rank for rank, queue in enumerate(self._queues) if queue]
        if not ranks:
            return None
        leader = self._first(ranks[0], now)
        for rank in reversed(ranks[1:]):
            first = self._first(rank, now)
            if self._shares[rank].is_due(first.seconds):
                return Turn(first, leader.shape.priority)
        return Turn(leader, leader.shape.priority)

    def release(self, waiting: Waiting, now: float) -> None:
        """It was its turn, and it is placed."""
        self._queues[waiting.rank].served(waiting)
        self._drain.left(waiting.seconds, now)
        self._count(waiting.rank, waiting.seconds, now - waiting.arrived)
        self._remove(waiting)

    def goes_first(self, shape: RequestShape) -> bool:
        """Whether nobody as important waits: a newcomer that can be placed need not wait either."""
        return not any(self._queues[: rank_of(shape.priority) + 1])

    def pass_by(self, shape: RequestShape, seconds: float) -> None:
        """One who goes first was placed on its arrival."""
        self._count(rank_of(shape.priority), seconds, 0.0)

    def withdraw(self, request: RequestId) -> bool:
        """Nobody wants it any more. Whether it waited."""
        waiting = self._waiting.get(request)
        if waiting is not None:
            self._remove(waiting)
        return waiting is not None

    def expire(self, now: float) -> list[Waiting]:
        """Those whose deadline is over leave."""
        over: list[Waiting] = []
        while (request := self._deadlines.first()) is not None:
            waiting = self._waiting[request]
            if waiting.deadline is None or waiting.deadline > now:
                break
            self._remove(waiting)
            over.append(waiting)
        return over

    def charge(self, rank: int, tenant: str, work: float, *, chosen: bool) -> None:
        """A tenant was served so much, or less than thought; `chosen`: by its turn and not afterwards."""
        self._queues[rank].charge(tenant, work, chosen=chosen)

    # ---- seen -------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float | None:
        """When `expire` has something to do."""
        least = self._deadlines.least()
        return None if least is None else least[0]

    @property
    def queued_seconds(self) -> float:
        """Predicted work of all who wait."""
        return sum(queue.seconds for queue in self._queues)

    def counts(self, now: float) -> tuple[ClassCounts, ...]:
        """Of each class."""
        return tuple(
            ClassCounts(
                length=len(queue),
                oldest_seconds=now - arrivals[0] if (arrivals := self._arrivals[rank].least()) else 0.0,
                released=self._released[rank],
                waited_seconds=self._waited_seconds[rank],
                rejected=dict(self._rejected[rank]),
            )
            for rank, queue in enumerate(self._queues)
        )

    def check(self) -> None:
        """Everyone waits in exactly one queue, within its bound."""
        for queue, arrivals, bound in zip(self._queues, self._arrivals, self._policy.queue, strict=True):
            queue.check()
            assert {waiting.shape.request for waiting in queue} == set(arrivals), "a request is lost"
            assert len(queue) <= bound, f"{len(queue)} wait where {bound} may"
        assert len(self._waiting) == sum(map(len, self._queues)), "a request is in two queues"
        timed = {request for request, waiting in self._waiting.items() if waiting.deadline is not None}
        assert timed == set(self._deadlines), "a deadline is lost"

    # ---- inside -----------------------------------------------------------------------------------------

    def _count(self, served: int, seconds: float, waited_seconds: float) -> None:
        self._released[served] += 1
        self._waited_seconds[served] += waited_seconds
        for rank, share in enumerate(self._shares):
            if rank == served:
                share.was_served(seconds)
            elif self._queues[rank]:
                share.others_served(seconds)

    def _first(self, rank: int, now: float) -> Waiting:
        first = self._queues[rank].first(now)
        assert first is not None, "an empty queue has no first"
        return first

    def _remove(self, waiting: Waiting) -> None:
        request, rank = waiting.shape.request, waiting.rank
        del self._waiting[request]
        self._queues[rank].remove(waiting)
        self._arrivals[rank].discard(request)
        self._deadlines.discard(request)
        if not self._queues[rank]:
            self._shares[rank].rest()
        if not self._waiting:
            self._drain.ended()

    def _check_room(self, shape: RequestShape, rank: int, now: float, assumed: float) -> None:
        queue, bound = self._queues[rank], self._policy.queue[rank]
        room, own = bound - len(queue), queue.length(shape.tenant)
        if room > 0 and own < _ROOM_FACTOR * room:
            return
        wait = self.wait_seconds(shape, now, assumed)
        what, reason = f"{len(queue):,} requests of {CLASSES[rank]} priority wait, {bound:,} may", "queue full"
        if room:
            what, reason = (
                f"{own:,} of them are this tenant's, and {room:,} places are for others",
                "tenant's part full",
            )
            what = f"{len(queue):,} requests of {CLASSES[rank]} priority wait, {what}"
        raise self._refusal(rank, reason, f"{what}: try again in {wait:.1f} s", wait)

    def _check_time(self, shape: RequestShape, rank: int, seconds: float, now: float, assumed: float) -> None:
        if shape.deadline_seconds is None and self._policy.give_up is None:
            return
        wait = self.wait_seconds(shape, now, assumed)
        done = wait + seconds
        if shape.deadline_seconds is not None and done > shape.deadline_seconds:
            message = f"its first token is predicted in {done:.1f} s, its deadline is in {shape.deadline_seconds:.1f} s"
            raise self._refusal(rank, "deadline", message, done - shape.deadline_seconds)
        if self._policy.give_up is None:
            return
        ttft, times = self._policy.ttft(shape), self._policy.give_up
        if done > times * ttft:
            message = f"its first token is predicted in {done:.1f} s, more than {times:g} times the {ttft:.1f} s wished"
            raise self._refusal(rank, "ttft", message, done - times * ttft)

    def _refusal(self, rank: int, reason: Reason, message: str, retry_after: float) -> Overloaded:
        self._rejected[rank][reason] += 1
        return Overloaded(message, retry_after=retry_after)
