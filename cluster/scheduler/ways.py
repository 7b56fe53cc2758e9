"""The ways to serve a request and the cheapest of them. Knows columns and slots, not workers or requests.

A pair's cost is its two sides' and a transfer's that depends on whether they share a host, so the
best pair is found among the best of each side, over all hosts and on each: no P x D pairs are priced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from cluster.scheduler.fleet import FAR, NEAR, Array, Fleet
from cluster.scheduler.rule import compute_cost, decode_cost, harm_cost
from diptych.types import How

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cluster.scheduler.costs import Asked, Estimate, Rule


class Way(NamedTuple):
    """One way to serve the request, by slots; `prefill` is -1 when `decode` computes the prompt."""

    cost: float
    how: How
    prefill: int
    decode: int

    @property
    def computes(self) -> int:
        """Who computes the prompt."""
        return self.decode if self.prefill < 0 else self.prefill


class Sides(NamedTuple):
    """The costs that ways are made of, by slot; infinite where a worker can't be placed on."""

    prefill: Array
    """Of computing the prompt for another."""
    decode: Array
    """Of receiving and decoding it. Two rows: from the same host, or not."""
    local: Array
    mixed: Array
    late: Mapping[How, float]
    """What each way's first tokens come later than the rest predicts."""


def sides_of(fleet: Fleet, found: Estimate, asked: Asked) -> Sides:
    """What each side of a way costs."""
    computing = compute_cost(found, asked.ttft_seconds, asked.usual_seconds)
    decoding = decode_cost(found, asked.itl_seconds) + fleet.tie
    both = computing + decoding + harm_cost(found)
    senders = fleet.prefill if fleet.placeable["prefill"] else fleet.mixed
    # The mixed pool alone hands nothing over.
    receivers = fleet.mixed if fleet.placeable["prefill"] and not fleet.placeable["decode"] else fleet.decode
    decode, mixed = fleet.decode, fleet.mixed
    if asked.context > fleet.shortest_context:
        senders = senders + _too_long(fleet, asked.prompt_tokens)
        too_long = _too_long(fleet, asked.context)
        receivers, decode, mixed = receivers + too_long, decode + too_long, mixed + too_long
    return Sides(
        prefill=computing + fleet.tie + senders,
        # A prompt that is being computed there holds up whoever joins.
        decode=found.transfer + (decoding + found.wait + receivers),
        local=both + decode,
        mixed=both + mixed if fleet.placeable["mixed"] else mixed,
        late=asked.late,
    )


def _too_long(fleet: Fleet, tokens: int) -> Array:
    return np.where(fleet.most_tokens >= tokens, 0.0, np.inf)


def best_way(sides: Sides, fleet: Fleet, how: Rule) -> Way | None:
    """The cheapest; of equals, one without a transfer."""
    ways: list[Way] = []
    if how != "remote":
        ways.append(alone(sides, "local", int(sides.local.argmin())))
        if fleet.placeable["mixed"]:
            ways.append(alone(sides, "mixed", int(sides.mixed.argmin())))
    if how != "local":
        ways += _pairs(sides, fleet)
    best = min(ways)
    return best if best.cost < np.inf else None


def alone(sides: Sides, how: Literal["local", "mixed"], slot: int) -> Way:
    """That worker as a way."""
    cost = (sides.local if how == "local" else sides.mixed).item(slot) + sides.late[how]
    return Way(cost, how, -1, slot)


def _pairs(sides: Sides, fleet: Fleet) -> list[Way]:
    """The best pair that shares a host and the best that doesn't; without the one that can't be better."""
    prefill, decode = int(sides.prefill.argmin()), int(sides.decode[FAR].argmin())
    best, late = pair(sides, fleet.host, prefill, decode), sides.late["remote"]
    if fleet.host[prefill] != fleet.host[decode]:
        bound = late + sides.prefill[prefill] + sides.decode[NEAR, int(sides.decode[NEAR].argmin())]
        return [best] if best.cost <= bound else [best, *_near(sides, fleet, prefill)]
    near = list(_near(sides, fleet, prefill))
    if near and near[0].cost <= late + sides.prefill[prefill] + sides.decode[FAR, decode]:
        return near
    # One of the two is in the best pair across hosts, the other is the best of all other hosts.
    elsewhere = np.where(fleet.host == fleet.host[prefill], np.inf, 0.0)
    other_decode = int((sides.decode[FAR] + elsewhere).argmin())
    other_prefill = int((sides.prefill + elsewhere).argmin())
    return [
        best,
        *near,
        pair(sides, fleet.host, prefill, other_decode),
        pair(sides, fleet.host, other_prefill, decode),
    ]


def _near(sides: Sides, fleet: Fleet, prefill: int) -> Iterator[Way]:
    """The best pair on one host; `prefill` is the best of all."""
    order, starts = fleet.by_host
    if len(starts) == 1:
        yield pair(sides, fleet.host, prefill, int(sides.decode[NEAR].argmin()))
    elif len(starts) < len(order):
        senders, receivers = sides.prefill[order], sides.decode[NEAR][order]
        host = int((np.minimum.reduceat(senders, starts) + np.minimum.reduceat(receivers, starts)).argmin())
        there = slice(int(starts[host]), int(starts[host + 1]) if host + 1 < len(starts) else len(order))
        sender, receiver = int(senders[there].argmin()), int(receivers[there].argmin())
        yield pair(sides, fleet.host, int(order[there][sender]), int(order[there][receiver]))


def pair(sides: Sides, hosts: Array, prefill: int, decode: int) -> Way:
    """That pair as a way."""
    kind = NEAR if hosts.item(prefill) == hosts.item(decode) else FAR
    cost = sides.prefill.item(prefill) + sides.decode.item(kind, decode) + sides.late["remote"]
    return Way(cost, "remote", prefill, decode)
