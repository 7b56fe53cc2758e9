"""More is asked for than there is room for, on a live cluster: who is served, who waits, and who is told at once."""

from __future__ import annotations

import random
import re
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from threading import Event
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from diptych import Client
from diptych.errors import DeadlineExceeded, Overloaded
from diptych.v1.inference_pb2 import GenerateRequest
from diptych.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diptych.v1.admin_pb2 import GetStatusResponse
    from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.e2e

PLACES = 32
"""In each class's queue."""
MAX_RUNNING = 4
WAIT_SECONDS = 120
LONG = {"max_tokens": 6000, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(cluster: Callable[..., AbstractContextManager[Cluster]]) -> Iterator[Cluster]:
    """One tiny worker that takes four at a time, before it room for 32 of each class."""
    wanted = ("pools.prefill.workers=0", "pools.decode.workers=0", "pools.mixed.workers=1", "model.dtype=fp32")
    limits = (f"engine.max_running={MAX_RUNNING}", "engine.threads=1", "kv.memory=64MiB")
    queues = tuple(f"admission.queue.{name}={PLACES}" for name in ("high", "normal", "low"))
    pairs = [part for pair in (*wanted, *limits, *queues) for part in ("--set", pair)]
    with cluster("--model", "random:tiny", *pairs) as running:
        yield running


def lengths(status: GetStatusResponse) -> dict[str, int]:
    return {queue.name: queue.length for queue in status.queues}


class Crowd:
    """Clients that ask at the same time."""

    def __init__(self, cluster: Cluster, threads: ThreadPoolExecutor) -> None:
        self.cluster = cluster
        self.order: list[str] = []
        """Of first tokens."""
        self._threads = threads
        self._dice = random.Random(7)
        self._let_go = Event()

    def occupy(self) -> list[Future[None]]:
        """The worker is full until `let_go`."""
        holders = [self._threads.submit(self._hold) for _ in range(MAX_RUNNING + 2)]
        self.cluster.until(
            lambda status: (
                status.workers[0].load.running_requests == MAX_RUNNING and sum(lengths(status).values()) >= 1
            ),
            "it is full",
        )
        return holders

    def let_go(self) -> None:
        self._let_go.set()

    def ask(self, name: str, **wishes: Any) -> Future[None]:
        prompt = self._dice.choices(range(3, 256), k=64)
        return self._threads.submit(self._ask, name, prompt, wishes)

    def _hold(self) -> None:
        with Client(self.cluster.grpc) as client:
            stream = client.generate("hold", priority=-(2**31), **LONG)
            next(stream)
            self._let_go.wait(WAIT_SECONDS)
            stream.close()

    def _ask(self, name: str, prompt: list[int], wishes: dict[str, Any]) -> None:
        with Client(self.cluster.grpc, timeout_seconds=WAIT_SECONDS) as client:
            stream = client.generate(tokens=prompt, max_tokens=2, ignore_eos=True, **wishes)
            next(stream)
            self.order.append(name)
            for _ in stream:
                pass


@pytest.fixture
def crowd(small: Cluster) -> Iterator[Crowd]:
    with ThreadPoolExecutor(80) as threads:
        crowd = Crowd(small, threads)
        yield crowd
        crowd.let_go()
    small.at_rest()


def test_the_more_important_are_served_first_and_tenants_in_turn(small: Cluster, crowd: Crowd) -> None:
    crowd.occupy()
    asked = [crowd.ask("low", priority=1) for _ in range(4)]
    asked += [crowd.ask("often", tenant="often") for _ in range(20)]
    asked += [crowd.ask("rare", tenant="rare") for _ in range(4)]
    asked += [crowd.ask("high", priority=-1) for _ in range(4)]
    small.until(lambda status: sum(lengths(status).values()) >= len(asked), "all of them wait")
    crowd.let_go()
    for each in asked:
        each.result(WAIT_SECONDS)
    print("\n" + " ".join(crowd.order))
    where = {name: [place for place, one in enumerate(crowd.order) if one == name] for name in crowd.order}
    assert len(crowd.order) == len(asked)
    # Two steps of four may overtake each other on the way.
    assert max(where["high"]) < 4 + 2 * MAX_RUNNING
    assert max(where["rare"]) < 4 + 2 * 4 + 3 * MAX_RUNNING, "in turn with the other tenant's first ones"
    assert min(where["low"]) >= len(asked) - 4 - 3 * MAX_RUNNING
    low = next(queue for queue in small.client.status().queues if queue.name == "low")
    assert low.released >= 4


def test_a_full_queue_refuses_before_any_step_and_says_when_to_come_back(small: Cluster, crowd: Crowd) -> None:
    crowd.occupy()
    already = lengths(small.client.status())["low"]
    for number in range(PLACES - already):
        crowd.ask("waits", priority=1, tenant=f"tenant {number}")  # one alone does not get the last places
    small.until(lambda status: lengths(status)["low"] == PLACES, "the queue is full")
    before = small.client.status()
    with pytest.raises(Overloaded, match=f"{PLACES} requests of low priority wait") as refused:
        small.answer(prompt="one more", priority=1)
    assert refused.value.retry_after > 0
    body = {"model": "random:tiny", "prompt": "one more", "max_tokens": 2}
    answer = httpx.post(f"http://{small.http}/v1/completions", json=body, headers={"x-priority": "1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    after = small.until(
        lambda status: Counter(dict(next(q for q in status.queues if q.name == "low").rejected))["queue full"] == 2,
        "both refusals are counted",
    )
    assert after.requests_placed == before.requests_placed, "they were placed nowhere"
    assert crowd.order == [], "nobody in the queue was served meanwhile"
    told = httpx.get(f"http://{small.http}/metrics").text
    assert re.search(r'diptych_queue_rejections_total\{class="low",reason="queue full"\} 2', told)


def test_who_hangs_up_in_the_queue_leaves_it_and_no_worker_ever_had_it(small: Cluster, crowd: Crowd) -> None:
    crowd.occupy()
    before = small.client.status()
    with grpc.insecure_channel(small.grpc) as channel:
        waiting = InferenceServiceStub(channel).Generate(GenerateRequest(text="never mind", priority=1))
        small.until(lambda status: lengths(status)["low"] == 1, "it waits")
        waiting.cancel()
        small.until(lambda status: lengths(status)["low"] == 0, "it is gone")
    after = small.client.status()
    assert after.requests_placed == before.requests_placed
    assert after.workers[0].counters.requests_cancelled == before.workers[0].counters.requests_cancelled


def test_a_deadline_that_passes_in_the_queue_ends_the_wait(small: Cluster, crowd: Crowd) -> None:
    crowd.occupy()
    before = small.client.status()
    with pytest.raises((DeadlineExceeded, Overloaded)):
        small.answer(prompt="in vain", priority=1, deadline_ms=1500)
    assert lengths(small.client.status())["low"] == 0
    assert small.client.status().requests_placed == before.requests_placed
