"""Who is next when more is wanted than there is: shares of work. Knows neither requests nor time.

Between tenants: virtual token counters (VTC; Sheng et al., Fairness in Serving Large Language
Models, OSDI 2024), weighted. Who was served least for its weight is next; who comes back from
idleness starts where the others are, so nobody saves up while idle.

Between ranks of importance: strict, but for a least share of those who come last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.scheduler.ranked import Ranked

if TYPE_CHECKING:
    from collections.abc import Mapping


class TenantCounters:
    """Work served to each tenant, over its weight. Work is in whatever unit the caller charges."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Tenants that `weights` doesn't name have 1."""
        self._weights = weights
        self._served: dict[str, float] = {}
        self._waiting: Ranked[str] = Ranked()
        self._idle: Ranked[str] = Ranked()
        self._floor = 0.0
        """What the tenant that was served last had been served by then: who wakes starts there."""
        self._waiting_weight = 0.0

    @property
    def waiting_weight(self) -> float:
        """Of all tenants who have something waiting."""
        return self._waiting_weight

    @property
    def known(self) -> int:
        """Tenants that are remembered: those waiting, and those served ahead of all who wait."""
        return len(self._served)

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def wake(self, tenant: str) -> None:
        """It has something waiting from now on."""
        if tenant in self._waiting:
            return
        self._idle.discard(tenant)
        served = self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
        self._waiting.put(tenant, served)
        self._waiting_weight += self.weight(tenant)

    def rest(self, tenant: str) -> None:
        """It has nothing waiting any more."""
        if tenant not in self._waiting:
            return
        self._waiting.discard(tenant)
        # From nothing again when nobody waits: sums of floats drift.
        self._waiting_weight = self._waiting_weight - self.weight(tenant) if len(self._waiting) else 0.0
        self._idle.put(tenant, self._served[tenant])
        self._forget()

    def next(self) -> str | None:
        """Who of those waiting was served least for its weight."""
        return self._waiting.first()

    def charge(self, tenant: str, work: float, *, chosen: bool = True) -> None:
        """It was served so much; less than 0 gives back what was charged too much.

        `chosen`: it was its turn, which is what moves the line that others start from.
        """
        before = self._served.get(tenant)
        if before is None:
            if work <= 0:
                return
            before = self._floor
        if chosen:
            self._floor = max(self._floor, before)
        self._served[tenant] = before + work / self.weight(tenant)
        (self._waiting if tenant in self._waiting else self._idle).put(tenant, self._served[tenant])
        self._forget()

    def check(self) -> None:
        """Every remembered tenant waits or rests, and who rests is ahead."""
        self._waiting.check()
        self._idle.check()
        assert len(self._served) == len(self._waiting) + len(self._idle), "a tenant is lost or in two places"
        assert all(self._served[tenant] > self._floor for tenant in self._idle), "an idle tenant needn't be remembered"

    def _forget(self) -> None:
        """Who rests and isn't ahead would start from the floor anyway."""
        while (tenant := self._idle.first()) is not None and self._served[tenant] <= self._floor:
            self._idle.discard(tenant)
            del self._served[tenant]


class LeastShare:
    """What is owed to one who comes last, while it waits: a share of all that is served meanwhile."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._owed = 0.0

    def is_due(self, work: float) -> bool:
        """Whether it is owed its next piece of so much work."""
        return self._share > 0 and self._owed >= work

    def others_served(self, work: float) -> None:
        """Others were, while it waited."""
        self._owed += self._share * work

    def was_served(self, work: float) -> None:
        """What it got beyond what it was owed is no debt: it was left over."""
        self._owed = max(0.0, self._owed - (1 - self._share) * work)

    def rest(self) -> None:
        """It waits for nothing: nothing is owed."""
        self._owed = 0.0
