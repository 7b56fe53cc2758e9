"""Ten times more than there is room for, for a minute: nothing grows, who is refused is told so, then all is as before.

Speed is judged by counters (tokens of a decode step), so a slow machine changes no verdict; times are printed only.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from diptych.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diptych.v1.admin_pb2 import GetStatusResponse
    from tests.e2e.conftest import Cluster, Start

pytestmark = [pytest.mark.e2e, pytest.mark.full]

PLACES = 32
MAX_RUNNING = 8
CLIENTS = 16
"""Enough to fill the decode worker."""
TIMES = 10
OVERLOAD_SECONDS = 60
WINDOW_SECONDS = 10
RECOVERY_SECONDS = 5
MAX_TOKENS = 600
PROMPTS = 6
WAIT_SECONDS = 180
GROWTH = 1.05
SLACK_MIB = 8.0


@pytest.fixture(scope="module")
def small(cluster: Start) -> Iterator[Cluster]:
    keys = (
        "model.dtype=fp32",
        "engine.threads=1",
        f"engine.max_running={MAX_RUNNING}",
        "kv.memory=32MiB",
        *(f"admission.queue.{name}={PLACES}" for name in ("high", "normal", "low")),
    )
    settings = [part for key in keys for part in ("--set", key)]
    with cluster("--model", "random:tiny", "--prefill", "1", "--decode", "1", *settings) as running:
        yield running


@dataclass
class Clients:
    """Ask one of a few prompts, by gRPC and HTTP in turn, and know each one's answer."""

    cluster: Cluster
    prompts: list[list[int]] = field(init=False)
    expected: list[tuple[tuple[int, ...], str]] = field(init=False)
    ends: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        dice = random.Random(3)
        self.prompts = [dice.choices(range(3, 256), k=64) for _ in range(PROMPTS)]
        answers = [self.cluster.answer(tokens=tokens, max_tokens=MAX_TOKENS) for tokens in self.prompts]
        self.expected = [(answer.tokens, answer.text) for answer in answers]
        self._http = httpx.Client(
            base_url=f"http://{self.cluster.http}", timeout=WAIT_SECONDS, limits=httpx.Limits(max_connections=None)
        )

    def ask(self, number: int) -> None:
        """Counts how it ended: whole or refused, and nothing else."""
        which = number % PROMPTS
        (self._by_http if number // PROMPTS % 2 else self._by_grpc)(which)

    def _by_grpc(self, which: int) -> None:
        try:
            answer = self.cluster.answer(tokens=self.prompts[which], max_tokens=MAX_TOKENS)
        except Overloaded as refusal:
            self.ends["refused, gRPC" if refusal.retry_after else "refused without a time"] += 1
            return
        assert answer.tokens == self.expected[which][0]
        self.ends["answered"] += 1

    def _by_http(self, which: int) -> None:
        ask = {"prompt": self.prompts[which], "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        response = self._http.post("/v1/completions", json={"model": "random:tiny", **ask})
        if response.status_code == 429:
            later = float(response.headers.get("retry-after", 0)) > 0
            self.ends["refused, HTTP" if later else "refused without a time"] += 1
            return
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == self.expected[which][1]
        self.ends["answered"] += 1

    def close(self) -> None:
        self._http.close()

    @property
    def refused(self) -> int:
        return self.ends["refused, gRPC"] + self.ends["refused, HTTP"]


@dataclass(frozen=True)
class Window:
    """What the decode worker did meanwhile."""

    answers: int
    tokens: int
    steps: int
    seconds: float

    @property
    def tokens_of_a_step(self) -> float:
        return self.tokens / self.steps


def window(clients: Clients, begin_seconds: float) -> Window:
    """Under as many clients as fill it, from so long after they began."""
    over, numbers = Event(), itertools.count()
    cluster = clients.cluster

    def keep_asking() -> None:
        while not over.is_set():
            clients.ask(next(numbers))

    with ThreadPoolExecutor(CLIENTS) as threads:
        asking = [threads.submit(keep_asking) for _ in range(CLIENTS)]
        try:
            time.sleep(begin_seconds)
            began, before, answered = time.monotonic(), decoding(cluster.client.status()), clients.ends["answered"]
            time.sleep(WINDOW_SECONDS)
            cluster.until(lambda status: decoding(status)[1] - before[1] >= MAX_TOKENS, "it decodes")
            after = decoding(cluster.client.status())
            answers, seconds = clients.ends["answered"] - answered, time.monotonic() - began
        finally:
            over.set()
        for each in asking:
            each.result(WAIT_SECONDS)
    return Window(answers, after[0] - before[0], after[1] - before[1], seconds)


def decoding(status: GetStatusResponse) -> tuple[int, int]:
    """Rows and steps, decoded so far."""
    counters = [worker.counters for worker in status.workers]
    return sum(one.decode_rows for one in counters), sum(one.decode_steps for one in counters)


def memory_mib(cluster: Cluster) -> dict[str, float]:
    """Of each actor of ours."""
    found: dict[str, float] = {}
    for process in cluster.processes():
        try:
            name = " ".join(process.cmdline()[:1])
            if name.startswith("ray::") and "Actor" in name:  # and which method it is in
                kind = name.removeprefix("ray::").partition(".")[0]
                found[f"{kind} {process.pid}"] = process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass
class Seen:
    """Second after second."""

    memory: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    waiting: list[int] = field(default_factory=list[int])
    at_workers: list[int] = field(default_factory=list[int])

    def look(self, cluster: Cluster) -> None:
        status = cluster.client.status()
        self.memory.append(memory_mib(cluster))
        self.waiting.append(max(queue.length for queue in status.queues))
        self.at_workers.append(max(worker.load.waiting_requests for worker in status.workers))


def overload(clients: Clients, per_second: float, until: Callable[[], bool]) -> Seen:
    """As many a second, whatever comes of those before."""
    seen, numbers, began = Seen(), itertools.count(), time.monotonic()
    asked: list[Future[None]] = []
    with ThreadPoolExecutor(4 * (PLACES + CLIENTS)) as threads:
        while not until():
            due = int((time.monotonic() - began) * per_second)
            asked += [threads.submit(clients.ask, next(numbers)) for _ in range(due - len(asked))]
            if len(seen.waiting) < time.monotonic() - began:
                seen.look(clients.cluster)
            time.sleep(0.01)
        for each in asked:
            each.result(WAIT_SECONDS)
    return seen


@pytest.fixture
def clients(small: Cluster) -> Iterator[Clients]:
    with closing(Clients(small)) as asking:
        yield asking


def test_ten_times_too_much_for_a_minute_is_refused_honestly_and_leaves_nothing_behind(clients: Clients) -> None:
    usual = window(clients, 1.0)
    usual_refusals, per_second = clients.refused, TIMES * max(1, usual.answers) / usual.seconds
    clients.ends.clear()
    over_at = time.monotonic() + OVERLOAD_SECONDS
    seen = overload(clients, per_second, lambda: time.monotonic() >= over_at)
    ends = dict(clients.ends)
    again = window(clients, RECOVERY_SECONDS)

    quarter = len(seen.memory) // 4
    print(f"\n{usual.answers} answers in {usual.seconds:.1f} s fill it; then {per_second:.1f} a second: {ends}")
    print(f"at most {max(seen.waiting)} waited of each class, {max(seen.at_workers)} at a worker")
    for who in seen.memory[-1]:
        early = max(look.get(who, 0.0) for look in seen.memory[quarter : 2 * quarter])
        late = max(look.get(who, 0.0) for look in seen.memory[-quarter:])
        print(f"{who}: {early:.0f} MiB in the second quarter, {late:.0f} MiB in the last")
        assert late <= GROWTH * early + SLACK_MIB
    print(
        f"tokens of a step: {usual.tokens_of_a_step:.2f} before, {again.tokens_of_a_step:.2f} from "
        f"{RECOVERY_SECONDS} s after; tokens a second {usual.tokens / usual.seconds:.0f} and "
        f"{again.tokens / again.seconds:.0f}"
    )
    assert usual_refusals == 0
    assert set(ends) == {"answered", "refused, gRPC", "refused, HTTP"}
    assert clients.refused > TIMES / 2 * ends["answered"]
    assert max(seen.waiting) <= PLACES
    assert max(seen.at_workers) <= PLACES
    assert again.tokens_of_a_step >= 0.9 * usual.tokens_of_a_step
    clients.cluster.at_rest()
