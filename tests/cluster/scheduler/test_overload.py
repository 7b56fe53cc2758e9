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
from diptych.errors import Overloaded, ServingError
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
