"""Twice as much is asked for as there is, in virtual time: who gets it, how long who waits, and that nobody idles.

The scheduler is the real one. Workers are virtual: they compute prompts in chunks, the most important
first, and report as real ones do, at most every tenth of a second while they are busy.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count

import pytest

from cluster.scheduler.admission import AdmissionPolicy
from cluster.scheduler.costs import Policy, RequestShape
from cluster.scheduler.scheduler import Scheduler, SchedulerSpec
from diptych.errors import DeadlineExceeded, Overloaded, ServingError
from diptych.types import Counters, Load, ModelSource, Placement, Report, RequestId, WorkerId, WorkerInfo

MODEL = ModelSource(name="tiny", path="tiny.gguf", digest="d1")
TOKENS_PER_SECOND = 10_000.0
CHUNK = 512
REPORT_SECONDS = 0.1
WORKERS = 4
CAPACITY = WORKERS * TOKENS_PER_SECOND
TYPICAL = 2_000
"""Prompt tokens of a request."""


@dataclass
class Prefiller:
    """A prefill worker's queue and its one engine."""

    id: WorkerId
    waiting: list[tuple[int, int, RequestShape]] = field(default_factory=list)
    """By priority, then by arrival."""
    done: dict[RequestId, int] = field(default_factory=dict)
    """Tokens computed of who isn't finished."""
    busy: bool = False
    computed: int = 0
    number: int = 0
    reported: float = 0.0

    @property
    def left(self) -> int:
        return sum(shape.prompt_tokens - self.done.get(shape.request, 0) for *_, shape in self.waiting)

    def report(self, now: float) -> Report:
        self.number, self.reported = self.number + 1, now
        load = Load(waiting_requests=len(self.waiting), waiting_tokens=self.left, blocks_free=1_000_000)
        counters = Counters(prompt_tokens_computed=self.computed)
        return Report(worker=self.id, epoch=1, number=self.number - 1, load=load, counters=counters)


@dataclass
class Seen:
    """What came of it."""

    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """TTFT, by what the request was called before its number."""
    work: Counter[str] = field(default_factory=Counter)
    """Prompt tokens computed, by name."""
    refused: Counter[str] = field(default_factory=Counter)
    retries: list[float] = field(default_factory=list)
    expired: int = 0
    """Whose deadline passed in the queue."""
    idle_seconds: float = 0.0
    """Of workers, while somebody waited in the queue."""
    longest: int = 0
    """Most that were with workers before they were computed."""

    def p(self, name: str, share: float) -> float:
        waits = sorted(self.waits[name])
        return waits[int(share * (len(waits) - 1))]


class VirtualCluster:
    """A clock, the scheduler and its workers."""

    def __init__(self, info: Callable[..., WorkerInfo], admission: AdmissionPolicy) -> None:
        spec = SchedulerSpec(
            model=MODEL, build="b1", policy=Policy(how="remote"), stale_seconds=1e9, admission=admission
        )
        self.scheduler = Scheduler(spec)
        self.now = 0.0
        self.seen = Seen()
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._arrived: dict[RequestId, float] = {}
        self._shapes: dict[RequestId, RequestShape] = {}
        self._workers = {WorkerId(f"p{n}"): Prefiller(WorkerId(f"p{n}")) for n in range(WORKERS)}
        for worker in self._workers:
            self.scheduler.join(replace(info(worker, role="prefill", max_context=100_000), blocks=1_000_000), 0.0)
        self.scheduler.join(replace(info("d0", max_context=1_000_000), blocks=1_000_000_000), 0.0)
        self._turn_at: float | None = None

    def run(self, arrivals: Iterable[tuple[float, RequestShape]], until: float) -> Seen:
        for at, shape in arrivals:
            self._at(at, lambda shape=shape: self._arrive(shape))
        while self._events and self._events[0][0] <= until:
            at, _, event = heapq.heappop(self._events)
            self._watch_idleness(at)
            self.now = at
            event()
        self.scheduler.check()
        return self.seen

    def _watch_idleness(self, at: float) -> None:
        if any(queue.length for queue in self.scheduler.status(self.now).queues):
            idle = sum(not worker.busy for worker in self._workers.values())
            self.seen.idle_seconds += idle * (at - self.now)

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _arrive(self, shape: RequestShape) -> None:
        self._arrived[shape.request] = self.now
        try:
            placement = self.scheduler.submit(shape, self.now)
        except Overloaded as refusal:
            self.seen.refused[_name(shape.request)] += 1
            self.seen.retries.append(refusal.retry_after)
            return
        self._shapes[shape.request] = shape
        if placement is not None:
            self._placed(shape, placement)
        self._plan_turn()

    def _placed(self, shape: RequestShape, placement: Placement | ServingError) -> None:
        if isinstance(placement, DeadlineExceeded):
            self.seen.expired += 1
            return
        assert isinstance(placement, Placement), placement
        assert placement.prefill is not None
        worker = self._workers[placement.prefill]
        priority = shape.priority if placement.priority is None else placement.priority
        heapq.heappush(worker.waiting, (priority, next(self._order), shape))
        self.seen.longest = max(self.seen.longest, sum(len(each.waiting) for each in self._workers.values()))
        if not worker.busy:
            self._step(worker)

    def _step(self, worker: Prefiller) -> None:
        worker.busy = bool(worker.waiting)
        if not worker.busy:
            return
        *_, shape = worker.waiting[0]
        tokens = min(CHUNK, shape.prompt_tokens - worker.done.get(shape.request, 0))
        self._at(self.now + tokens / TOKENS_PER_SECOND, lambda: self._stepped(worker, shape, tokens))

    def _stepped(self, worker: Prefiller, shape: RequestShape, tokens: int) -> None:
        worker.computed += tokens
        worker.done[shape.request] = worker.done.get(shape.request, 0) + tokens
        self.seen.work[_name(shape.request)] += tokens
        if worker.done[shape.request] == shape.prompt_tokens:
            worker.waiting = [entry for entry in worker.waiting if entry[2] is not shape]
            heapq.heapify(worker.waiting)
            del worker.done[shape.request]
            self.seen.waits[_name(shape.request)].append(self.now - self._arrived[shape.request])
        self._step(worker)
        if not worker.busy or self.now - worker.reported >= REPORT_SECONDS:
            self.scheduler.report(worker.report(self.now), self.now)
            self._advance()

    def _advance(self) -> None:
        for request, placement in self.scheduler.advance(self.now):
            self._placed(self._shapes[request], placement)
        self._plan_turn()

    def _plan_turn(self) -> None:
        turn = self.scheduler.next_turn(self.now)
        if turn is not None and (self._turn_at is None or turn < self._turn_at or self._turn_at <= self.now):
            self._turn_at = turn
            self._at(turn, self._advance)


def _name(request: RequestId) -> str:
    return request.rpartition("-")[0]


def poisson(
    name: str, share: float, seconds: float, *, seed: int = 0, tokens: int = TYPICAL, **fields: object
) -> list[tuple[float, RequestShape]]:
    """Requests that ask for such a share of what all workers can do."""
    drawn = random.Random(f"{name} {seed}")
    rate, at = share * CAPACITY / tokens, 0.0
    arrivals: list[tuple[float, RequestShape]] = []
    while (at := at + drawn.expovariate(rate)) < seconds:
        request = RequestId(f"{name}-{len(arrivals)}")
        length = drawn.randint(tokens // 2, tokens * 3 // 2)
        arrivals.append((at, RequestShape(request=request, granules=(), prompt_tokens=length, max_tokens=1, **fields)))
    return arrivals


Run = Callable[..., Seen]


@pytest.fixture
def run(info: Callable[..., WorkerInfo]) -> Run:
    def ran(*loads: list[tuple[float, RequestShape]], seconds: float, admission: AdmissionPolicy | None = None) -> Seen:
        arrivals = sorted((arrival for load in loads for arrival in load), key=lambda arrival: arrival[0])
        return VirtualCluster(info, admission or AdmissionPolicy()).run(arrivals, seconds)

    return ran


def test_important_requests_do_not_feel_twice_the_load_and_the_rest_is_for_the_others(run: Run) -> None:
    high, low = (poisson(name, share, 60, priority=p) for name, share, p in (("high", 0.4, -1), ("low", 1.6, 1)))
    alone, crowded = run(high, seconds=60), run(high, low, seconds=60)
    assert crowded.p("high", 0.99) <= 1.2 * alone.p("high", 0.99)
    assert crowded.refused["high"] == 0
    done = 60 * CAPACITY
    assert crowded.work["low"] >= 0.97 * (done - crowded.work["high"])


def test_less_important_requests_never_starve_even_where_important_ones_alone_are_too_many(run: Run) -> None:
    high, low = (poisson(name, share, 60, priority=p) for name, share, p in (("high", 1.6, -1), ("low", 0.4, 1)))
    crowded = run(high, low, seconds=60)
    total = crowded.work["high"] + crowded.work["low"]
    assert 0.04 * total <= crowded.work["low"] <= 0.08 * total
    assert crowded.idle_seconds == 0


@pytest.mark.parametrize(("weights", "share"), [({}, 1 / 2), ({"rare": 0.5}, 1 / 3)])
def test_tenants_with_ten_times_the_demand_get_no_more_than_their_fair_share(
    run: Run, weights: dict[str, float], share: float
) -> None:
    often, rare = (poisson(name, rate, 60, tenant=name) for name, rate in (("often", 6.0), ("rare", 0.6)))
    crowded = run(often, rare, seconds=60, admission=AdmissionPolicy(weights=weights, queue=(200, 200, 200)))
    total = crowded.work["often"] + crowded.work["rare"]
    assert crowded.work["rare"] == pytest.approx(share * total, rel=0.05)
    assert crowded.refused["often"] > 10 * crowded.refused["rare"]


def test_a_tenant_that_asks_for_less_than_its_share_gets_all_of_it_soon(run: Run) -> None:
    often, rare = (poisson(name, rate, 60, tenant=name) for name, rate in (("often", 2.0), ("rare", 0.2)))
    crowded = run(often, rare, seconds=60)
    assert crowded.refused["rare"] == 0
    assert crowded.p("rare", 0.99) <= 1.5
    assert len(crowded.waits["rare"]) >= 0.97 * len(rare)


def test_an_idle_cluster_places_on_arrival(run: Run, info: Callable[..., WorkerInfo]) -> None:
    scheduler = VirtualCluster(info, AdmissionPolicy()).scheduler
    for number in range(WORKERS):
        shape = RequestShape(request=RequestId(f"r-{number}"), granules=(), prompt_tokens=100, max_tokens=1)
        assert scheduler.submit(shape, 0.0) is not None
    light = run(poisson("few", 0.3, 30), seconds=30)
    assert light.p("few", 0.5) <= 1.1 * TYPICAL / TOKENS_PER_SECOND
    assert not light.refused


def test_within_a_tenant_more_first_tokens_are_in_time_than_in_the_order_of_arrival(run: Run) -> None:
    """Half of them wish for it soon: they overtake those who can wait, as long as both can be in time."""
    soon = poisson("soon", 0.5, 60, ttft_seconds=0.8)
    late = poisson("late", 0.45, 60, ttft_seconds=20.0)
    crowded = run(soon, late, poisson("burst", 0.2, 20, ttft_seconds=20.0), seconds=70)
    assert crowded.p("soon", 0.95) <= 0.8
    assert crowded.p("late", 1.0) <= 20.0


def test_who_missed_its_time_is_served_all_the_same(run: Run) -> None:
    crowded = run(poisson("all", 2.0, 60, ttft_seconds=1.0), seconds=60)
    waits = crowded.waits["all"]
    assert sum(wait <= 1.0 for wait in waits) >= 0.5 * len(waits), "most of those served are in time"
    assert sum(wait > 1.0 for wait in waits) >= 0.05 * len(waits), "but the late ones are served too"


def test_a_full_queue_refuses_and_says_when_to_come_back(run: Run) -> None:
    small = AdmissionPolicy(queue=(8, 8, 8))
    crowded = run(poisson("all", 2.0, 60), seconds=60, admission=small)
    assert 0.45 <= crowded.refused["all"] / (crowded.refused["all"] + len(crowded.waits["all"])) <= 0.55
    assert crowded.p("all", 1.0) <= (8 + 2 * WORKERS) * 1.5 * TYPICAL / CAPACITY + 2
    assert all(0 < seconds < 3 for seconds in crowded.retries), "what waits is worked off in that time"
    assert crowded.idle_seconds == 0


def test_who_would_wait_beyond_its_deadline_is_told_on_arrival_and_few_of_the_others_miss_it(run: Run) -> None:
    crowded = run(poisson("all", 2.0, 60, deadline_seconds=2.0, ttft_seconds=2.0), seconds=62)
    asked = crowded.refused["all"] + len(crowded.waits["all"]) + crowded.expired
    assert 0.3 <= crowded.refused["all"] / asked <= 0.55, "about what there is no room for"
    assert crowded.expired <= 0.05 * asked
    assert sum(wait > 2.0 for wait in crowded.waits["all"]) <= 0.05 * asked
    assert crowded.idle_seconds == 0


def test_few_prompts_are_with_workers_before_their_turn(run: Run) -> None:
    """Their order can be chosen until then."""
    crowded = run(poisson("all", 2.0, 30), seconds=30)
    assert crowded.longest <= WORKERS * 4
