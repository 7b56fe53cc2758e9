"""Which workers should change their role, and how many there should be. Knows no Ray, clock, view or worker.

A role's demand is a number of workers: what prompts ask for a second, and what waits of them to be done within the
wished time to a first token; and what of slots, blocks and the wished pace answers fill, with what they grow by. Its
load is its demand over its workers. Roles move first, from the less loaded to the one that is short, until it isn't
or both are as full; who moves is who has least to do. The number of workers changes when roles can't help.

Damping: short has to last, a move in the other direction waits until the last one has settled, the bar for moving
back is the other role's being short, and a worker less is only wanted when all are calm for minutes.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.scheduler.needs import POOLS, Needs
from diptych.types import AutoscaleStatus, ScalePool, SetWorkerRole

if TYPE_CHECKING:
    from cluster.scheduler.needs import Pool
    from cluster.scheduler.pressure import Pressure
    from diptych.types import Operation

_ENOUGH: Final = 0.9
"""Of what is busy: so much load a role that was short is brought down to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many workers there may be."""

    least: int = 1
    most: float = inf


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalePolicy:
    """What is wanted of the cluster, and how patient it is."""

    dry_run: bool = False
    interval_seconds: float = 1.0
    busy: float = 0.85
    """A role with more load than this is short of workers."""
    calm: float = 0.5
    """Workers with less load than this, all together, are one too many."""
    window_seconds: float = 4.0
    """What is asked for is averaged over so long, and answers are assumed to grow on for as long."""
    hold_seconds: float = 2.0
    """A role has to be short for so long before workers come to it …"""
    settle_seconds: float = 30.0
    """… and for a worker to go the other way, the last move has to be so old."""
    grow_seconds: float = 15.0
    """Another worker is wanted when roles couldn't help for so long …"""
    shrink_seconds: float = 120.0
    """… and one less when all were calm for so long."""
    itl_seconds: float = 0.1
    """Wished between an answer's tokens."""
    decode_per_prefill: float = 0.25
    """So many decode workers there are at least for each prefill worker: their links take in what those send."""
    prefill: Bounds = Bounds()
    decode: Bounds = Bounds()
    workers: Bounds = Bounds(least=2, most=2)
    """Of both roles together."""

    def bounds(self, role: Pool) -> Bounds:
        """Of one role."""
        return self.prefill if role == "prefill" else self.decode


class Decision(NamedTuple):
    """What to do now, in order, and why."""

    operations: tuple[Operation, ...] = ()
    words: str = ""


_NOTHING: Final = Decision()


class Autoscaler:
    """Of one cluster: what it remembers is its damping."""

    def __init__(self, policy: AutoscalePolicy) -> None:
        self.policy = policy
        self._seen: deque[Pressure] = deque()
        self._short: tuple[Pool, float] | None = None
        self._last_move: tuple[Pool, float] | None = None
        self._helpless_since: float | None = None
        self._calm_since: float | None = None
        self._wanted: Counter[str] = Counter()
        self._moves: Counter[str] = Counter()
        self._words = ""
        self._told: float | None = None
        """When something was last wanted."""
        self._reversals = 0

    def decide(self, pressure: Pressure) -> Decision:
        """To be asked at each interval; what it says it takes as done."""
        needs = self._needs(pressure)
        if self.policy.dry_run and self._told is not None and pressure.at - self._told < self.policy.settle_seconds:
            return _NOTHING  # nobody did it: it would be said again at every interval
        self._wanted = Counter({role: needs.have(role) for role in POOLS})
        if not needs.total:
            return _NOTHING
        decision = self._move(pressure, needs) or self._resize(pressure.at, needs)
        if decision.operations:
            self._told = pressure.at
            self._words = decision.words
        return decision

    @property
    def status(self) -> AutoscaleStatus:
        """For people and metrics."""
        return AutoscaleStatus(
            dry_run=self.policy.dry_run,
            wanted=tuple((role, self._wanted[role]) for role in POOLS),
            changes=tuple(sorted(self._moves.items())),
            reversals=self._reversals,
            words=self._words,
        )

    # ---- what is needed ---------------------------------------------------------------------------------

    def _needs(self, now: Pressure) -> Needs:
        seen = self._seen
        seen.append(now)
        while len(seen) > 2 and now.at - seen[1].at >= self.policy.window_seconds:
            seen.popleft()
        before = seen[0]
        seconds = max(now.at - before.at, self.policy.interval_seconds)
        # A prompt is predicted anew when it is placed: what was asked for may seem to shrink.
        asked = max(0.0, now.asked_seconds - before.asked_seconds) / seconds
        growth = (now.filled - before.filled) / seconds if len(now.decode) >= len(before.decode) else 0.0
        return Needs(
            prefill=asked + now.waiting_seconds / now.ttft_seconds,
            decode=now.filled + max(0.0, growth) * self.policy.window_seconds,
            prefills=len(now.prefill),
            decodes=len(now.decode),
        )

    # ---- roles ------------------------------------------------------------------------------------------

    def _move(self, now: Pressure, needs: Needs) -> Decision | None:
        taker: Pool = "prefill" if needs.load("prefill") > needs.load("decode") else "decode"
        giver: Pool = "decode" if taker == "prefill" else "prefill"
        if needs.load(taker) <= self.policy.busy:
            self._short = None
            return None
        if self._short is None or self._short[0] != taker:
            self._short = taker, now.at
        if now.at - self._short[1] < self.policy.hold_seconds or not self._has_settled(taker, now.at):
            return None
        count = self._how_many(needs, taker, giver)
        if not count:
            return None
        self._note_move(taker, now.at, count)
        then = needs.moved(taker, count)
        self._wanted = Counter({role: then.have(role) for role in POOLS})
        going = sorted(now.of(giver), key=lambda each: each.load)[:count]
        names = ", ".join(each.worker for each in going)
        return Decision(
            tuple(SetWorkerRole(worker=each.worker, role=taker) for each in going),
            f"{names} to {taker}, which is short: {needs}; then {then}",
        )

    def _how_many(self, needs: Needs, taker: Pool, giver: Pool) -> int:
        """Until the taker has enough, or the giver would be as full."""
        count = 0
        while needs.moved(taker, count).load(taker) > self.policy.busy * _ENOUGH:
            then = needs.moved(taker, count + 1)
            if not self._is_allowed(then, needs) or then.load(giver) > needs.moved(taker, count).load(taker):
                break
            count += 1
        return count

    def _is_allowed(self, then: Needs, now: Needs) -> bool:
        """A pool that is out of its bounds may stay so, not get farther."""
        within = all(
            min(bounds.least, now.have(role)) <= then.have(role) <= max(bounds.most, now.have(role))
            for role in POOLS
            for bounds in [self.policy.bounds(role)]
        )
        return within and then.decodes >= self.policy.decode_per_prefill * then.prefills

    def _has_settled(self, taker: Pool, now: float) -> bool:
        last = self._last_move
        return last is None or last[0] == taker or now - last[1] >= self.policy.settle_seconds

    def _note_move(self, taker: Pool, now: float, count: int) -> None:
        if self._last_move is not None and self._last_move[0] != taker:
            self._reversals += 1
        self._last_move = taker, now
        self._moves[f"{taker} short"] += count
        self._helpless_since = self._calm_since = None

    # ---- how many ---------------------------------------------------------------------------------------

    def _resize(self, now: float, needs: Needs) -> Decision:
        policy = self.policy
        short = max(needs.load(role) for role in POOLS) > policy.busy
        calm = (needs.prefill + needs.decode) / needs.total < policy.calm
        self._helpless_since = (self._helpless_since or now) if short else None
        self._calm_since = (self._calm_since or now) if calm else None
        if self._helpless_since is not None and now - self._helpless_since >= policy.grow_seconds:
            return self._grow(needs)
        if self._calm_since is not None and now - self._calm_since >= policy.shrink_seconds:
            return self._shrink(needs)
        return _NOTHING

    def _grow(self, needs: Needs) -> Decision:
        role: Pool = "prefill" if needs.load("prefill") > needs.load("decode") else "decode"
        missing = ceil(needs.demand(role) / (self.policy.busy * _ENOUGH)) - needs.have(role)
        room = min(self.policy.workers.most - needs.total, self.policy.bounds(role).most - needs.have(role))
        count = int(min(missing, room))
        if count < 1:
            return _NOTHING
        return self._resized(needs, role, count, f"{count} more to {role}, which is short and others are too: {needs}")

    def _shrink(self, needs: Needs) -> Decision:
        role: Pool = "prefill" if needs.load("prefill") <= needs.load("decode") else "decode"
        fewer = needs.resized(role, -1)
        if (
            needs.total <= self.policy.workers.least
            or not self._is_allowed(fewer, needs)
            or fewer.load(role) > self.policy.busy
        ):
            return _NOTHING
        return self._resized(needs, role, -1, f"1 less of {role}: all are calm: {needs}")

    def _resized(self, needs: Needs, role: Pool, count: int, words: str) -> Decision:
        self._helpless_since = self._calm_since = None
        self._wanted[role] += count
        self._moves["grown" if count > 0 else "shrunk"] += abs(count)
        return Decision((ScalePool(role=role, workers=needs.have(role) + count),), words)
