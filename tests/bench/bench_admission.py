"""How long a live cluster takes to refuse what it has no room for, over both protocols. At most 50 ms are wanted.

One tiny worker takes one request at a time and one may wait: both places are held while others are refused.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import httpx
from results import Figure, figure, report
from serving import serving

from diptych import Client
from diptych.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving import Cluster

HOLDERS = 3
"""One runs, one waits at the worker, one in the queue."""
WAIT_SECONDS = 60
SETTINGS = (
    "pools.prefill.workers=0",
    "pools.decode.workers=0",
    "pools.mixed.workers=1",
    "engine.max_running=1",
    "engine.threads=1",
    "kv.memory=64MiB",
    "admission.queue.normal=1",
)


def hold(cluster: Cluster, let_go: Event) -> None:
    """Takes a place until `let_go`."""
    with Client(cluster.grpc) as client:
        while not let_go.is_set():
            try:
                for _ in client.generate("hold", max_tokens=6000, ignore_eos=True):
                    if let_go.is_set():
                        return
            except Overloaded as refusal:
                let_go.wait(min(refusal.retry_after, 0.1))


def refused_over_grpc(client: Client) -> None:
    """Raises AssertionError when it is not refused."""
    try:
        list(client.generate("one more", max_tokens=1))
    except Overloaded:
        return
    raise AssertionError("it was served")


def refused_over_http(session: httpx.Client, url: str) -> None:
    """The same."""
    answer = session.post(url, json={"model": "random:tiny", "prompt": "one more", "max_tokens": 1})
    assert (answer.status_code, "retry-after" in answer.headers) == (429, True), answer.text


def milliseconds(refuse: Callable[[], None], calls: int) -> list[float]:
    """Of each call, one after the other."""
    taken: list[float] = []
    for _ in range(calls):
        began = time.perf_counter()
        refuse()
        taken.append((time.perf_counter() - began) * 1000)
    return sorted(taken)


def until_full(client: Client) -> None:
    """The queue has no place left."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not any(queue.length for queue in client.status().queues):
        assert time.monotonic() < deadline, "the queue did not fill"
        time.sleep(0.05)


def measured(cluster: Cluster, calls: int) -> list[Figure]:
    """Both protocols."""
    let_go = Event()
    with ThreadPoolExecutor(HOLDERS) as threads, Client(cluster.grpc) as client, httpx.Client() as session:
        held = [threads.submit(hold, cluster, let_go) for _ in range(HOLDERS)]
        try:
            until_full(client)
            url = f"http://{cluster.http}/v1/completions"
            ways: dict[str, Callable[[], None]] = {
                "gRPC": lambda: refused_over_grpc(client),
                "HTTP": lambda: refused_over_http(session, url),
            }
            figures: list[Figure] = []
            for name, refuse in ways.items():
                taken = milliseconds(refuse, calls)
                figures.append(figure(name, "arrival to refusal", "ms", taken))
                figures.append(figure(name, "the same, 99th of 100", "ms", [taken[int(0.99 * (calls - 1))]]))
            return figures
        finally:
            let_go.set()
            for each in held:
                each.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="refusals over each protocol")
    arguments = parser.parse_args()
    pairs = [part for pair in SETTINGS for part in ("--set", pair)]
    with serving("--model", "random:tiny", *pairs) as cluster:
        report("admission", measured(cluster, arguments.calls))


if __name__ == "__main__":
    main()
