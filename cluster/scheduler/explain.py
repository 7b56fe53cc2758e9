"""A decision in numbers and words, made when somebody asks. Decides nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from cluster.scheduler.costs import Estimate
from cluster.scheduler.fleet import FAR, NEAR
from cluster.scheduler.placement import Considered
from cluster.scheduler.pricing import PlainCosts
from cluster.scheduler.ways import Sides, Way, alone, pair
from diptych.types import Candidate, CostTerm

if TYPE_CHECKING:
    from cluster.scheduler.fleet import Array
    from diptych.types import WorkerId

_RECORDED = 8
_BEST_OF_A_SIDE = 3
_COLUMNS = [column.name for column in fields(Estimate) if "Array" in str(column.type)]
_SMALL = 64
"""Workers of whom all is kept: 10 kB a considered."""


def kept(considered: Considered) -> Considered:
    """What is kept of it to tell of it later: bounded, however large the cluster."""
    return considered if len(considered.hosts) <= _SMALL else brief(considered)


def brief(considered: Considered) -> Considered:
    """The same with the best few workers of each side alone: what is worth keeping of one among a thousand."""
    sides, way, found = considered.sides, considered.way, considered.estimate
    slots = {way.computes, way.decode}
    for costs in (sides.prefill, sides.decode[NEAR], sides.decode[FAR], sides.local, sides.mixed):
        slots.update(_best(costs))
    kept = sorted(slots)
    few = replace(
        found, **{name: getattr(found, name)[..., kept] for name in _COLUMNS if getattr(found, name) is not None}
    )
    place = {slot: place for place, slot in enumerate(kept)}
    return considered._replace(
        way=way._replace(prefill=place.get(way.prefill, -1), decode=place[way.decode]),
        costs=PlainCosts(
            few,
            Sides(
                prefill=sides.prefill[kept],
                decode=sides.decode[:, kept],
                local=sides.local[kept],
                mixed=sides.mixed[kept],
                late=sides.late,
            ),
        ),
        ids=[considered.ids[slot] for slot in kept],
        hosts=considered.hosts[kept],
    )


def candidates(considered: Considered) -> tuple[Candidate, ...]:
    """The cheapest ways that were open, the chosen one first."""
    return tuple(_candidate(considered, way) for way in _ways(considered))


def reason(considered: Considered) -> str:
    """Why it was this one, in a sentence."""
    found, way, predicted = considered.estimate, considered.way, considered.placement.predicted
    assert predicted is not None, "a placement without a prediction"
    computes = considered.ids[way.computes]
    told = (
        f"{computes} computes {considered.computed_tokens:,} of {considered.prompt_tokens:,} prompt tokens "
        f"behind {_seconds(predicted.wait_seconds)} of queue"
    )
    if considered.placement.prefix_from and found.fetched_tokens is not None:
        fetched = int(found.fetched_tokens[way.computes])
        told += f", after fetching {fetched:,} from {considered.placement.prefix_from}'s cache,"
    if way.prefill >= 0:
        told += f", sends {considered.ids[way.decode]} the {int(found.missing_tokens[way.decode]):,} it lacks, which"
    told += (
        f" and decodes beside {int(found.rows[way.decode])} other requests"
        if way.prefill < 0
        else (f" decodes beside {int(found.rows[way.decode])} others")
    )
    told += (
        f": first token after {_seconds(predicted.ttft_seconds)}, {_seconds(predicted.itl_seconds)} between tokens, "
        f"cost {_seconds(way.cost)}"
    )
    others = [one for one in _ways(considered) if one[1:] != way[1:]]
    if considered.how != "auto":
        return f"{told}; placement.how = {considered.how} left no choice of way"
    if not others:
        return f"{told}; there was no other way"
    return f"{told}; the next best ({others[0].how}, {_workers(considered, others[0])}) {_seconds(others[0].cost)}"


def _ways(considered: Considered) -> list[Way]:
    sides, hosts = considered.sides, considered.hosts
    ways = [considered.way]
    if considered.how != "remote":
        ways += [alone(sides, "local", slot) for slot in _best(sides.local)]
        ways += [alone(sides, "mixed", slot) for slot in _best(sides.mixed)]
    if considered.how != "local":
        receivers = {*_best(sides.decode[NEAR]), *_best(sides.decode[FAR])}
        ways += [pair(sides, hosts, *both) for both in product(_best(sides.prefill), receivers)]
    open_ = {way[1:]: way for way in ways if way.cost < np.inf}
    return sorted(open_.values(), key=lambda way: (way[1:] != considered.way[1:], way.cost))[:_RECORDED]


def _best(costs: Array) -> list[int]:
    left, found = costs.copy(), list[int]()
    while len(found) < _BEST_OF_A_SIDE and left[slot := int(left.argmin())] < np.inf:
        found.append(slot)
        left[slot] = np.inf
    return found


def _candidate(considered: Considered, way: Way) -> Candidate:
    found, computes, decode = considered.estimate, way.computes, way.decode
    terms = [
        CostTerm("queue", float(found.wait[computes])),
        CostTerm("compute", float(found.compute[computes])),
        CostTerm("decode", float(found.step[decode]) * found.answer_tokens),
        CostTerm("slower for others", float(found.rows[decode] * found.growth[decode]) * found.answer_tokens),
    ]
    if found.fetch is not None and found.fetch[computes]:
        terms.append(CostTerm("prefix fetch", float(found.fetch[computes])))
    if way.prefill >= 0:
        kind = NEAR if considered.hosts[computes] == considered.hosts[decode] else FAR
        terms.append(CostTerm("transfer", float(found.transfer[kind, decode])))
    else:
        terms.append(CostTerm("others wait for the prompt", float(found.rows[decode] * found.prompt[decode])))
    if found.room is not None and found.room[decode]:
        terms.append(CostTerm("wait for room", float(found.room[decode])))
    # What is promised, what whoever comes next finds queued, and what earlier predictions were short of.
    terms.append(CostTerm("weighed", way.cost - sum(term.value for term in terms)))
    return Candidate(
        prefill=_id(considered, way.prefill), decode=_known(_id(considered, decode)), how=way.how, terms=tuple(terms)
    )


def _id(considered: Considered, slot: int) -> WorkerId | None:
    return None if slot < 0 else considered.ids[slot]


def _known(worker: WorkerId | None) -> WorkerId:
    assert worker is not None, "a vacant slot was a candidate"
    return worker


def _workers(considered: Considered, way: Way) -> str:
    decode = considered.ids[way.decode]
    return f"{decode} alone" if way.prefill < 0 else f"{considered.ids[way.prefill]} with {decode}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1.0 else f"{1e3 * value:.1f} ms"
