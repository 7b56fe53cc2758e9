"""A decode worker is killed with sixteen long answers half told: how long each pauses, and what is computed again.

On the default model. Most of an answer's KV is still in the cache of the worker that computed its prompt.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import pytest

from diptych import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Cluster, Start

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(1800)]

STREAMS, PROMPT, BEFORE, AFTER = 16, 900, 100, 32
MOST = 1000
"""Tokens of an answer: nobody's ends while the slowest comes to its hundredth."""
WAIT_SECONDS = 900


@pytest.fixture(scope="module")
def three(cluster: Start) -> Iterator[Cluster]:
    """One worker computes prompts, two decode, in fp32."""
    keys = ("model.dtype=fp32", "engine.threads=1", "placement.how=remote", "kv.memory=2GiB", "kv.lease_seconds=60")
    settings = [part for key in keys for part in ("--set", key)]
    with cluster("--prefill", "1", "--decode", "2", *settings) as running:
        yield running


def computed(cluster: Cluster) -> int:
    """Prompt tokens so far, by all workers that live."""
    time.sleep(2.5)  # reports, and the status that fronts serve again
    return sum(worker.counters.prompt_tokens_computed for worker in cluster.client.status().workers)


class Stream:
    """One answer, read until some tokens after the strike."""

    def __init__(self, client: Client, prompt: list[int], struck: Event) -> None:
        self.heard = 0
        self.longest_pause_seconds = 0.0
        """After the strike."""
        self._told = client.generate(tokens=prompt, max_tokens=MOST, ignore_eos=True, temperature=0)
        self._struck = struck

    def read(self) -> None:
        last, after = time.monotonic(), 0
        for response in self._told:
            now, count = time.monotonic(), len(response.chunk.token_ids)
            self.heard += count
            if self._struck.is_set():
                self.longest_pause_seconds, after = max(self.longest_pause_seconds, now - last), after + count
            last = now
            if after >= AFTER:
                break
        self._told.close()


def test_a_fifth_of_it_at_most_is_computed_again(three: Cluster) -> None:
    dice, struck = random.Random(3), Event()
    with Client(three.grpc, timeout_seconds=WAIT_SECONDS) as client, ThreadPoolExecutor(STREAMS) as threads:
        streams = [Stream(client, dice.choices(range(1000, 40_000), k=PROMPT), struck) for _ in range(STREAMS)]
        running = [threads.submit(stream.read) for stream in streams]
        while min(stream.heard for stream in streams) < BEFORE:
            over = [each.exception() for each in running if each.done()]
            assert not over, f"answers ended before all had come so far: {over}"
            time.sleep(0.05)
        status = three.client.status()
        victim = max(
            (worker for worker in status.workers if worker.info.id.startswith("decode")),
            key=lambda worker: worker.load.running_requests,
        )
        lost = victim.load.running_requests
        before = computed(three) - victim.counters.prompt_tokens_computed
        everything = lost * (PROMPT + sum(stream.heard for stream in streams) // STREAMS)
        os.kill(victim.info.pid, signal.SIGKILL)
        struck.set()
        for each in running:
            each.result(WAIT_SECONDS)
    again = computed(three) - before
    pauses = [stream.longest_pause_seconds for stream in streams]
    print(
        f"\n{lost} of {STREAMS} answers lost their worker, {everything // lost} tokens long: {again} tokens computed "
        f"again of {everything} ({again / everything:.3f}); pauses: median {statistics.median(pauses):.1f} s, longest "
        f"{max(pauses):.1f} s"
    )
    assert lost >= STREAMS // 4
    assert 0 < again <= everything / 5
    three.at_rest()
