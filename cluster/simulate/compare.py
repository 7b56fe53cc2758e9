"""Policies side by side on one trace: at given speeds, and the highest speed each one keeps its SLO at.

Knows runs and their summaries; not how a run is made or how a result is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.simulate.baselines import BASELINES
from cluster.simulate.cluster import VirtualCluster
from cluster.simulate.ours import Ours, ours
from cluster.simulate.prefill_only import Placed, bound, place_all
from cluster.simulate.run import Kill
from cluster.simulate.sharded import SHARDED
from cluster.simulate.summary import Summary, is_good, summarise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cluster.simulate.asked import Asked
    from cluster.simulate.constants import Constants
    from cluster.simulate.policy import Maker, Policy
    from cluster.simulate.run import Run
    from cluster.simulate.trace import Trace

POLICIES: dict[str, Maker] = {**{each.name: each for each in BASELINES}, Ours.name: Ours}
"""What is compared unless somebody names others."""
MAKERS: dict[str, Maker] = POLICIES | SHARDED
_VARIANTS = {each.name: each.variants for each in BASELINES}
_PRECISION = 1.02
"""The highest speed is found to so much."""
_BEYOND = 1.1
"""Weights are compared at so much more than the default weights bear: where they differ."""
_MOST_SPEED = 4096.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One policy at one speed."""

    policy: str
    weights: str
    speed: float
    highest: bool
    """The highest speed that keeps the SLO, and not one that was asked for."""
    summary: Summary
    run: Run = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared on."""

    trace: Trace
    constants: Constants
    kills: tuple[Kill, ...] = ()
    tell: Callable[[str], None]
    """Progress, a line each."""

    def make(self, maker: Maker) -> Policy:
        """Ours is as the constants have it."""
        return ours(self.constants) if maker is Ours else maker()

    def at(self, maker: Maker, speed: float, *, highest: bool = False) -> Result:
        """One whole run."""
        policy = self.make(maker)
        self.tell(f"{policy.name} at {speed:.4g}x")
        cluster = VirtualCluster(self.trace, self.constants, policy, speed=speed, kills=self.kills)
        run = cluster.run()
        cluster.check()
        summary = summarise(run, self.constants.slo, self.constants.kv_bytes_per_token)
        return Result(
            policy=policy.name, weights=policy.weights, speed=speed, highest=highest, summary=summary, run=run
        )

    def keeps(self, maker: Maker, speed: float) -> bool:
        """Whether the SLO's share of requests is good; stops when too many are not."""
        bad = 0
        spare = int((1 - self.constants.slo.share) * len(self.trace.requests) + 1e-9)

        def is_hopeless(asked: Asked) -> bool:
            nonlocal bad
            bad += not is_good(asked, self.constants.slo)
            return bad > spare

        policy = self.make(maker)
        cluster = VirtualCluster(
            self.trace, self.constants, policy, speed=speed, kills=self.kills, is_hopeless=is_hopeless
        )
        cluster.run()
        self.tell(f"{policy.name} at {speed:.4g}x {'misses' if bad > spare else 'keeps'} the SLO")
        return bad <= spare

    def highest_speed(self, maker: Maker, guess: float) -> float:
        """By doubling or halving from `guess`, then bisection; 0 when even 1/1000 is too fast."""
        low, high = guess, guess
        if self.keeps(maker, guess):
            while self.keeps(maker, high := low * 2):
                low = high
                if low > _MOST_SPEED:
                    return low
        else:
            while not self.keeps(maker, low := high / 2):
                high = low
                if high < 0.001:
                    return 0.0
        while high / low > _PRECISION:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.keeps(maker, middle) else (low, middle)
        return low

    def tuned(self, name: str, speed: float) -> Maker:
        """The baseline's best weights at a speed: the highest goodput."""
        best = max(_VARIANTS[name](), key=lambda maker: self.at(maker, speed).summary.goodput)
        self.tell(f"{name}: best with {best().weights}")
        return best


def compare(
    comparison: Comparison, names: Sequence[str], speeds: Sequence[float], *, highest: bool, tune: bool
) -> Iterator[Result]:
    """Each policy at each of `speeds`, and at the highest speed it bears."""
    guess = max(speeds, default=8.0)
    for name in names:
        maker = MAKERS[name]
        if highest or tune:
            bears = comparison.highest_speed(maker, guess)
            if tune and name in _VARIANTS and len(list(_VARIANTS[name]())) > 1:
                maker = comparison.tuned(name, max(bears, 0.001) * _BEYOND)
                bears = max(bears, comparison.highest_speed(maker, max(bears, 0.001)))
        else:
            bears = 0.0
        for speed in speeds:
            yield comparison.at(maker, speed)
        if highest and bears:
            yield comparison.at(maker, bears, highest=True)


def placements(
    trace: Trace, constants: Constants, names: Sequence[str], tell: Callable[[str], None]
) -> Iterator[Placed]:
    """Each policy in placement alone, then the bound."""
    for name in names:
        tell(f"{name} places")
        if name != Ours.name:
            yield place_all(trace, constants, MAKERS[name]())
            continue
        for eviction in ("lru", "reuse"):
            yield place_all(trace, constants, Ours(queues=False), eviction)
    yield bound(trace, constants, POLICIES["round_robin"]())
