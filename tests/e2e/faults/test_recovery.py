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
from threading import Barrier
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Cluster, Start

pytestmark = [pytest.mark.e2e, pytest.mark.full]

STREAMS, PROMPT, BEFORE, AFTER = 16, 900, 100, 8
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


def test_a_fifth_of_it_at_most_is_computed_again(three: Cluster) -> None:
    dice = random.Random(3)
    prompts = [dice.choices(range(1000, 40_000), k=PROMPT) for _ in range(STREAMS)]
    half, struck = Barrier(STREAMS + 1), Barrier(STREAMS + 1)

    def stream(prompt: list[int]) -> tuple[float, int]:
        heard, longest = 0, 0.0
        told = three.client.generate(tokens=prompt, max_tokens=BEFORE + AFTER, ignore_eos=True, temperature=0)
        waited = False
        last = time.monotonic()
        for response in told:
            now = time.monotonic()
            if waited:
                longest = max(longest, now - last)
            last = now
            heard += len(response.chunk.token_ids)
            if heard >= BEFORE and not waited:
                half.wait(WAIT_SECONDS)
                struck.wait(WAIT_SECONDS)
                waited, last = True, time.monotonic()
        return longest, heard

    with ThreadPoolExecutor(STREAMS) as threads:
        running = [threads.submit(stream, prompt) for prompt in prompts]
        half.wait(WAIT_SECONDS)
        status = three.client.status()
        victim = max(
            (worker for worker in status.workers if worker.info.id.startswith("decode")),
            key=lambda worker: worker.load.running_requests,
        )
        lost = victim.load.running_requests
        before = computed(three) - victim.counters.prompt_tokens_computed
        os.kill(victim.info.pid, signal.SIGKILL)
        struck.wait(WAIT_SECONDS)
        pauses, heard = zip(*(each.result(WAIT_SECONDS) for each in running), strict=True)
    again = computed(three) - before
    everything = lost * (PROMPT + BEFORE)
    print(
        f"\n{lost} of {STREAMS} answers lost their worker: {again} tokens computed again of {everything} "
        f"({again / everything:.3f}); pauses median {statistics.median(pauses):.1f} s, longest {max(pauses):.1f} s"
    )
    assert set(heard) == {BEFORE + AFTER}
    assert lost >= STREAMS // 4
    assert 0 < again <= everything / 5
    three.at_rest()
