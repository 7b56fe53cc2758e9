"""From the command to the first work in the new role: the real model, under load, and nobody fails."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Cluster, Start

pytestmark = [pytest.mark.e2e, pytest.mark.full]

CLIENTS = 6
ROUNDS = 5
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def served(cluster: Start) -> Iterator[Cluster]:
    keys = ("placement.how=remote", "engine.threads=1", "kv.memory=512MiB")
    settings = [part for key in keys for part in ("--set", key)]
    with cluster("--prefill", "1", "--decode", "2", *settings) as running:
        yield running


class Load:
    """Clients that ask again and again, each with a prompt of its own; when who did what for them first."""

    def __init__(self, cluster: Cluster) -> None:
        self._client = cluster.client
        self._over = Event()
        self.done: list[tuple[str, str, float]] = []
        """A role, who had it in an answer, and when its first token came (monotonic seconds)."""

    def run(self, number: int) -> int:
        dice, count = random.Random(number), 0
        while not self._over.is_set():
            asked, heard = dice.choices(range(3, 40000), k=64), list[float]()
            for response in self._client.generate(tokens=asked, max_tokens=16, ignore_eos=True, temperature=0):
                heard += [time.monotonic()] * len(response.chunk.token_ids)
                if response.HasField("complete"):
                    how = response.complete.diptych
                    self.done.append(("prefill", how.prefill_worker, heard[0]))
                    self.done.append(("decode", how.decode_worker, heard[1]))  # the first is the prompt's
            assert len(heard) == 16
            count += 1
        return count

    def stop(self) -> None:
        self._over.set()

    def seconds_to_work(self, role: str, worker: str, since: float) -> float:
        """Until the first token of an answer for which the worker had this role."""
        while time.monotonic() < since + WAIT_SECONDS:
            if times := [at for had, who, at in self.done if (had, who) == (role, worker) and at > since]:
                return min(times) - since
            time.sleep(0.01)
        raise AssertionError(f"{worker} did nothing in its new role for {WAIT_SECONDS} s")


def test_a_worker_works_in_its_new_role_within_a_second_of_the_command(served: Cluster) -> None:
    load, took = Load(served), {"prefill": list[float](), "decode": list[float]()}
    weights = {worker.info.id: (worker.info.pid, worker.info.epoch) for worker in served.client.status().workers}
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(load.run, number) for number in range(CLIENTS)]
        try:
            for _ in range(ROUNDS):
                for role in ("prefill", "decode"):
                    began = time.monotonic()
                    served.client.set_role("decode-1", role)
                    took[role].append(load.seconds_to_work(role, "decode-1", began))
        finally:
            load.stop()
        answered = sum(each.result(WAIT_SECONDS) for each in running)
    for role, seconds in took.items():
        middle = sorted(seconds)[len(seconds) // 2]
        print(f"\nto {role}: {middle:.2f} s to the first token ({min(seconds):.2f} to {max(seconds):.2f}, n {ROUNDS})")
    print(f"{answered} answers, none failed")
    assert {
        worker.info.id: (worker.info.pid, worker.info.epoch) for worker in served.client.status().workers
    } == weights
    served.at_rest()
