"""The smallest pools that keep the SLO on a trace, and the runs around them that show it. Knows no way to run one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cluster.simulate.compare import Comparison, Result
    from cluster.simulate.policy import Maker

_MOST_WORKERS = 1024
"""In a pool."""
_DETOUR = 2
"""Workers more than the best so far, on the way to a better one."""


class Pools(NamedTuple):
    """How many workers of each role."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.prefill + self.decode


class TooMuch(ValueError):
    """No pools of any size keep the SLO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """For one speed of the trace."""

    pools: Pools
    speed: float
    result: Result
    """With these pools."""
    smaller: tuple[tuple[Pools, Result], ...]
    """With one worker less in either pool: what shows that none can go."""


def plan(comparison: Comparison, maker: Maker, speed: float) -> Plan:
    """Raises TooMuch."""

    def with_pools(pools: Pools) -> Comparison:
        workers = {"prefill": pools.prefill, "decode": pools.decode, "mixed": 0}
        told = comparison.constants.workers.model_copy(update=workers)
        return replace(comparison, constants=comparison.constants.model_copy(update={"workers": told}))

    def keeps(pools: Pools) -> bool:
        comparison.tell(f"{pools.prefill} prefill and {pools.decode} decode workers …")
        return with_pools(pools).keeps(maker, speed)

    pools = smallest(keeps)
    fewer = (Pools(pools.prefill - 1, pools.decode), Pools(pools.prefill, pools.decode - 1))
    return Plan(
        pools=pools,
        speed=speed,
        result=with_pools(pools).at(maker, speed),
        smaller=tuple((less, with_pools(less).at(maker, speed)) for less in fewer if min(less)),
    )


def smallest(keeps: Callable[[Pools], bool]) -> Pools:
    """The fewest workers, found by walking along the edge of what keeps the SLO, both ways from even pools.

    Exact where more workers never do worse and one of a role is worth at most so many of the other as the walk may
    go beyond its best. Raises TooMuch.
    """
    keeps = cache(keeps)
    even = _smallest_even(keeps)
    best = even
    for step in (Pools(-1, 1), Pools(1, -1)):
        best = min(best, _walk(keeps, even, step), key=lambda pools: pools.total)
    return best


def _smallest_even(keeps: Callable[[Pools], bool]) -> Pools:
    """Both pools of one size."""
    high = 1
    while not keeps(Pools(high, high)):
        high *= 2
        if high > _MOST_WORKERS:
            raise TooMuch(f"{_MOST_WORKERS:,} prefill and as many decode workers miss the SLO: it asks for too much")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(Pools(middle, middle)) else (middle, high)
    return Pools(high, high)


def _walk(keeps: Callable[[Pools], bool], start: Pools, step: Pools) -> Pools:
    """From pools that keep: one fewer of one role while that is enough, then one more of the other, and so on."""
    best = pools = start
    while pools.total <= best.total + _DETOUR:
        less = Pools(pools.prefill + min(0, step.prefill), pools.decode + min(0, step.decode))
        if not min(less):
            return best
        if keeps(less):
            pools = less
            best = min(best, less, key=lambda one: one.total)
        else:
            pools = Pools(pools.prefill + max(0, step.prefill), pools.decode + max(0, step.decode))
    return best
