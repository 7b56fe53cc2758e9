"""The requests of one class of priority that wait for a place, in the order in which they get one.

Between tenants by weighted fairness, within a tenant by slack: of those that can still have their
first token in time, who must start soonest; those that can't any more go behind, but for a least
share that keeps them from waiting for ever. Knows neither workers nor other classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cluster.scheduler.fairness import LeastShare, TenantCounters
from cluster.scheduler.ranked import Ranked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cluster.scheduler.costs import RequestShape
    from diptych.types import RequestId

LATE_SHARE: Final = 0.125
"""Of a tenant's work, for its requests that missed their first token's time already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request that waits. Times are monotonic seconds."""

    shape: RequestShape
    rank: int
    """Of its class: 0 comes first."""
    seconds: float
    """Predicted, to compute its prompt."""
    arrived: float
    start_by: float
    """Placed later it is not likely to have its first token in time."""
    deadline: float | None
    """Later than that nobody wants it."""


class TenantQueue:
    """One tenant's."""

    def __init__(self) -> None:
        self._waiting: dict[RequestId, Waiting] = {}
        self._on_time: Ranked[RequestId] = Ranked()
        self._starts: Ranked[RequestId] = Ranked()
        self._late: Ranked[RequestId] = Ranked()
        self._late_share = LeastShare(LATE_SHARE)
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def seconds(self) -> float:
        """Work of all that wait."""
        return self._seconds

    @property
    def late(self) -> int:
        """How many missed their time."""
        return len(self._late)

    def add(self, waiting: Waiting) -> None:
        request = waiting.shape.request
        assert request not in self._waiting, f"{request} waits already"
        self._waiting[request] = waiting
        self._seconds += waiting.seconds
        self._on_time.put(request, waiting.shape.priority, waiting.start_by)
        self._starts.put(request, waiting.start_by)

    def remove(self, waiting: Waiting) -> None:
        request = waiting.shape.request
        del self._waiting[request]
        self._seconds = self._seconds - waiting.seconds if self._waiting else 0.0
        for place in (self._on_time, self._starts, self._late):
            place.discard(request)
        if not self._late:
            self._late_share.rest()

    def first(self, now: float) -> Waiting:
        """Whose turn it is. Somebody waits."""
        self._sort_out(now)
        on_time, late = self._on_time.first(), self._late.first()
        if late is not None and (on_time is None or self._late_share.is_due(self._waiting[late].seconds)):
            return self._waiting[late]
        assert on_time is not None, "nobody waits"
        return self._waiting[on_time]

    def served(self, waiting: Waiting) -> None:
        """It was its turn. Before it is removed."""
        if waiting.shape.request in self._late:
            self._late_share.was_served(waiting.seconds)
        elif self._late:
            self._late_share.others_served(waiting.seconds)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    def check(self) -> None:
        """Everyone is either on time or late."""
        for place in (self._on_time, self._starts, self._late):
            place.check()
        assert set(self._on_time) == set(self._starts)
        assert set(self._waiting) == set(self._on_time) | set(self._late), "a request is lost"
        assert len(self._waiting) == len(self._on_time) + len(self._late), "a request is in two places"

    def _sort_out(self, now: float) -> None:
        while (request := self._starts.first()) is not None and self._waiting[request].start_by < now:
            self._starts.discard(request)
            self._on_time.discard(request)
            self._late.put(request, self._waiting[request].arrived)


class ClassQueue:
    """One class's, over all tenants. Answers in O(log n)."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._tenants: dict[str, TenantQueue] = {}
        self._counters = TenantCounters(weights)
        self._count = 0
        self._seconds = 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Waiting]:
        for tenant in self._tenants.values():
            yield from tenant

    @property
    def seconds(self) -> float:
        """Work of all that wait."""
        return self._seconds

    def length(self, tenant: str) -> int:
        """How many of the tenant's wait."""
        return len(self._tenants.get(tenant, ()))

    def seconds_before(self, tenant: str) -> float:
        """Work that is done before a newcomer of this tenant has its turn, if all get their fair shares."""
        own = self._tenants.get(tenant)
        weight = self._counters.weight(tenant)
        waits = self._counters.waiting_weight + (0.0 if own else weight)
        # With nothing of its own before it, one turn of each of the others at most.
        mine = own.seconds if own else self._seconds / max(1, self._count)
        return min(self._seconds, mine * waits / weight)

    def add(self, waiting: Waiting) -> None:
        tenant = waiting.shape.tenant
        self._tenants.setdefault(tenant, TenantQueue()).add(waiting)
        self._counters.wake(tenant)
        self._count += 1
        self._seconds += waiting.seconds

    def remove(self, waiting: Waiting) -> None:
        """It leaves, served or not."""
        tenant = waiting.shape.tenant
        queue = self._tenants[tenant]
        queue.remove(waiting)
        self._count -= 1
        self._seconds = self._seconds - waiting.seconds if self._count else 0.0
        if not queue:
            del self._tenants[tenant]
            self._counters.rest(tenant)

    def first(self, now: float) -> Waiting | None:
        """Whose turn it is."""
        tenant = self._counters.next()
        return None if tenant is None else self._tenants[tenant].first(now)

    def served(self, waiting: Waiting) -> None:
        """It was its turn; before it is removed."""
        self._tenants[waiting.shape.tenant].served(waiting)

    def charge(self, tenant: str, work: float, *, chosen: bool) -> None:
        """The tenant was served so much."""
        self._counters.charge(tenant, work, chosen=chosen)

    def check(self) -> None:
        """Counts and sums are those of the tenants' queues."""
        self._counters.check()
        for queue in self._tenants.values():
            queue.check()
            assert queue, "an empty queue stays behind"
        assert self._count == sum(map(len, self._tenants.values())), "a request is lost or counted twice"
        assert abs(self._seconds - sum(waiting.seconds for waiting in self)) < 1e-6 * (1 + self._seconds)
