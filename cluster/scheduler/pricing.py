"""One request on every worker and the cheapest way to serve it, in numbers. Knows no names and makes no records.

There is a meaning (`price_by_numpy`) and, where a compiler is, an implementation with the same signature and the
same bits that takes a tenth of the time (`native_pricing`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from cluster.scheduler.costs import Asked, Estimate, estimate
from cluster.scheduler.fleet import FAR, NEAR, Fleet
from cluster.scheduler.ways import Sides, Way, best_way, sides_of

if TYPE_CHECKING:
    from typing import TypeAlias


class Costs(Protocol):
    """Of all workers: what a choice was made from."""

    @property
    def estimate(self) -> Estimate: ...
    @property
    def sides(self) -> Sides: ...


class PlainCosts(NamedTuple):
    """As they were computed."""

    estimate: Estimate
    sides: Sides


class Priced(NamedTuple):
    """The cheapest way and what it takes; tokens are of the prompt."""

    way: Way
    lender: int
    """Slot of whose cache gives `fetched_tokens`, if there are any."""
    wait_seconds: float
    first_token_seconds: float
    compute_seconds: float
    reused_tokens: float
    """Cached where the prompt is computed."""
    fetched_tokens: float
    uncached_tokens: float
    """Not cached there."""
    lacked_tokens: float
    """Not cached where it is decoded."""
    step_seconds: float
    """Of decoding, with the newcomer."""
    gap_seconds: float
    """Between the first token and the second, beside a step."""
    costs: Costs


if TYPE_CHECKING:
    from collections.abc import Callable

    Pricing: TypeAlias = Callable[[Fleet, Asked], Priced | None]
    """None where there is no way."""


def price_by_numpy(fleet: Fleet, asked: Asked) -> Priced | None:
    """What `Pricing` means."""
    found = estimate(fleet, asked)
    sides = sides_of(fleet, found, asked)
    way = best_way(sides, fleet, asked.how)
    return None if way is None else _priced(fleet, found, sides, way)


def _priced(fleet: Fleet, found: Estimate, sides: Sides, way: Way) -> Priced:
    computes, decode = way.computes, way.decode
    kind = NEAR if fleet.host.item(computes) == fleet.host.item(decode) else FAR
    gap = found.transfer.item(kind, decode) if way.prefill >= 0 else 0.0
    if found.room is not None:
        gap += found.room.item(decode)
    return Priced(
        way=way,
        lender=found.holder_for(computes),
        wait_seconds=found.wait.item(computes),
        first_token_seconds=found.first_token.item(computes),
        compute_seconds=found.compute.item(computes),
        reused_tokens=found.reused_tokens.item(computes),
        fetched_tokens=0.0 if found.fetched_tokens is None else found.fetched_tokens.item(computes),
        uncached_tokens=found.missing_tokens.item(computes),
        lacked_tokens=found.missing_tokens.item(decode),
        step_seconds=found.step.item(decode),
        gap_seconds=gap,
        costs=PlainCosts(found, sides),
    )
