"""A decision in numbers and words, made when somebody asks. Decides nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from cluster.scheduler.costs import Estimate
from cluster.scheduler.fleet import FAR, NEAR
from cluster.scheduler.placement import Decision, Sides, Way, alone, pair
from diptych.types import Candidate, CostTerm

if TYPE_CHECKING:
    from cluster.scheduler.fleet import Array
    from diptych.types import WorkerId

_RECORDED = 8
_BEST_OF_A_SIDE = 3
_SMALL = 64
"""Workers of whom all is kept: 10 kB a decision."""


def kept(decision: Decision) -> Decision:
    """What is kept of a decision to tell of it later: without its prompt's names, and bounded in size."""
    decision = decision._replace(
        placed=decision.placed._replace(granules=()),
        estimate=replace(decision.estimate, rows=decision.estimate.rows.copy()),
    )
    return decision if len(decision.hosts) <= _SMALL else brief(decision)


def brief(decision: Decision) -> Decision:
    """The same with the best few workers of each side alone: what is worth keeping of one among a thousand."""
    sides, way = decision.sides, decision.way
    slots = {way.computes, way.decode}
    for costs in (sides.prefill, sides.decode[NEAR], sides.decode[FAR], sides.local, sides.mixed):
        slots.update(_best(costs))
    kept = sorted(slots)
    found = decision.estimate
    columns: dict[str, Array | float | None] = {one.name: getattr(found, one.name) for one in fields(Estimate)}
    few = {name: column[..., kept] for name, column in columns.items() if isinstance(column, np.ndarray)}
    place = {slot: place for place, slot in enumerate(kept)}
    return decision._replace(
        way=way._replace(prefill=place.get(way.prefill, -1), decode=place[way.decode]),
        estimate=replace(found, **few),
        sides=Sides(
            prefill=sides.prefill[kept],
            decode=sides.decode[:, kept],
            local=sides.local[kept],
            mixed=sides.mixed[kept],
            late=sides.late,
        ),
        ids=[decision.ids[slot] for slot in kept],
        hosts=decision.hosts[kept],
    )


def candidates(decision: Decision) -> tuple[Candidate, ...]:
    """The cheapest ways that were open, the chosen one first."""
    return tuple(_candidate(decision, way) for way in _ways(decision))


def reason(decision: Decision) -> str:
    """Why it was this one, in a sentence."""
    found, way, predicted = decision.estimate, decision.way, decision.placement.predicted
    assert predicted is not None, "a placement without a prediction"
    computes = decision.ids[way.computes]
    told = (
        f"{computes} computes {decision.placed.tokens:,} of {decision.prompt_tokens:,} prompt tokens "
        f"behind {_seconds(predicted.wait_seconds)} of queue"
    )
    if decision.placement.prefix_from and found.fetched_tokens is not None:
        fetched = int(found.fetched_tokens[way.computes])
        told += f", after fetching {fetched:,} from {decision.placement.prefix_from}'s cache,"
    if way.prefill >= 0:
        told += f", sends {decision.ids[way.decode]} the {int(found.missing_tokens[way.decode]):,} it lacks, which"
    told += (
        f" and decodes beside {int(found.rows[way.decode])} other requests"
        if way.prefill < 0
        else (f" decodes beside {int(found.rows[way.decode])} others")
    )
    told += (
        f": first token after {_seconds(predicted.ttft_seconds)}, {_seconds(predicted.itl_seconds)} between tokens, "
        f"cost {_seconds(way.cost)}"
    )
    others = [one for one in _ways(decision) if one[1:] != way[1:]]
    if decision.how != "auto":
        return f"{told}; placement.how = {decision.how} left no choice of way"
    if not others:
        return f"{told}; there was no other way"
    return f"{told}; the next best ({others[0].how}, {_workers(decision, others[0])}) {_seconds(others[0].cost)}"


def _ways(decision: Decision) -> list[Way]:
    sides, hosts = decision.sides, decision.hosts
    ways = [decision.way]
    if decision.how != "remote":
        ways += [alone(sides, "local", slot) for slot in _best(sides.local)]
        ways += [alone(sides, "mixed", slot) for slot in _best(sides.mixed)]
    if decision.how != "local":
        receivers = {*_best(sides.decode[NEAR]), *_best(sides.decode[FAR])}
        ways += [pair(sides, hosts, *both) for both in product(_best(sides.prefill), receivers)]
    open_ = {way[1:]: way for way in ways if way.cost < np.inf}
    return sorted(open_.values(), key=lambda way: (way[1:] != decision.way[1:], way.cost))[:_RECORDED]


def _best(costs: Array) -> list[int]:
    few = np.argpartition(costs, _BEST_OF_A_SIDE)[:_BEST_OF_A_SIDE] if len(costs) > _BEST_OF_A_SIDE else costs.argsort()
    return [int(slot) for slot in few if costs[slot] < np.inf]


def _candidate(decision: Decision, way: Way) -> Candidate:
    found, computes, decode = decision.estimate, way.computes, way.decode
    terms = [
        CostTerm("queue", float(found.wait[computes])),
        CostTerm("compute", float(found.compute[computes])),
        CostTerm("decode", float(found.step[decode]) * found.answer_tokens),
        CostTerm("slower for others", float(found.rows[decode] * found.growth[decode]) * found.answer_tokens),
    ]
    if found.fetch is not None and found.fetch[computes]:
        terms.append(CostTerm("prefix fetch", float(found.fetch[computes])))
    if way.prefill >= 0:
        kind = NEAR if decision.hosts[computes] == decision.hosts[decode] else FAR
        terms.append(CostTerm("transfer", float(found.transfer[kind, decode])))
    else:
        terms.append(CostTerm("others wait for the prompt", float(found.rows[decode] * found.prompt[decode])))
    if found.room is not None and found.room[decode]:
        terms.append(CostTerm("wait for room", float(found.room[decode])))
    # What is promised, what whoever comes next finds queued, and what earlier predictions were short of.
    terms.append(CostTerm("weighed", way.cost - sum(term.value for term in terms)))
    return Candidate(
        prefill=_id(decision, way.prefill), decode=_known(_id(decision, decode)), how=way.how, terms=tuple(terms)
    )


def _id(decision: Decision, slot: int) -> WorkerId | None:
    return None if slot < 0 else decision.ids[slot]


def _known(worker: WorkerId | None) -> WorkerId:
    assert worker is not None, "a vacant slot was a candidate"
    return worker


def _workers(decision: Decision, way: Way) -> str:
    decode = decision.ids[way.decode]
    return f"{decode} alone" if way.prefill < 0 else f"{decision.ids[way.prefill]} with {decode}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1.0 else f"{1e3 * value:.1f} ms"
