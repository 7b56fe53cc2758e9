"""The autoscaler on a live cluster: the load flips, a worker changes its role, and no client notices."""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from diptych.v1.admin_pb2 import ROLE_DECODE, ROLE_PREFILL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diptych.v1.admin_pb2 import GetStatusResponse
    from tests.e2e.conftest import Cluster, Start

pytestmark = pytest.mark.e2e

CLIENTS = 24
WAIT_SECONDS = 240
KEYS = (
    "model.dtype=fp32",
    "engine.threads=1",
    "engine.max_running=8",
    "kv.memory=32MiB",
    "placement.how=remote",
    "autoscale.enabled=true",
    "autoscale.interval_seconds=0.25",
    "autoscale.hold_seconds=1",
    "autoscale.settle_seconds=20",
    "autoscale.itl_seconds=10",
)
LONG_PROMPTS: dict[str, Any] = {"length": 1800, "max_tokens": 2}
LONG_ANSWERS: dict[str, Any] = {"length": 16, "max_tokens": 300}


@pytest.fixture(scope="module")
def moving(cluster: Start) -> Iterator[Cluster]:
    settings = [part for key in KEYS for part in ("--set", key)]
    with cluster("--model", "random:tiny", "--prefill", "2", "--decode", "2", *settings) as running:
        yield running


def split(status: GetStatusResponse) -> tuple[int, int]:
    """Prefill and decode workers."""
    roles = [worker.info.role for worker in status.workers]
    return roles.count(ROLE_PREFILL), roles.count(ROLE_DECODE)


def under(cluster: Cluster, kind: dict[str, Any], true: Callable[[GetStatusResponse], bool], what: str) -> int:
    """How many answers ended, each whole, until it was true under such a load."""
    over = Event()

    def ask(number: int) -> int:
        dice, count = random.Random(number), 0
        while not over.is_set():
            tokens = dice.choices(range(3, 256), k=kind["length"])
            answer = cluster.answer(tokens=tokens, max_tokens=kind["max_tokens"])
            assert len(answer.tokens) == kind["max_tokens"]
            count += 1
        return count

    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(ask, number) for number in range(CLIENTS)]
        try:
            cluster.until(true, what)
        finally:
            over.set()
        return sum(each.result(WAIT_SECONDS) for each in running)


def loads(cluster: Cluster) -> int:
    """How often a worker came up, and read weights for it."""
    return len(re.findall(r"(?:prefill|decode)-\d+ is up:", cluster.log.read_text()))


def test_a_flip_of_the_load_moves_a_role_without_a_failed_answer_or_a_weight_read(moving: Cluster) -> None:
    epochs = {worker.info.id: worker.info.epoch for worker in moving.client.status().workers}
    pids = {worker.info.id: worker.info.pid for worker in moving.client.status().workers}
    assert loads(moving) == len(pids)
    told: list[str] = []
    for kind, wanted in ((LONG_ANSWERS, (1, 3)), (LONG_PROMPTS, (3, 1)), (LONG_ANSWERS, (1, 3))):
        before = moving.client.status().autoscale.reversals
        answered = under(moving, kind, lambda status, wanted=wanted: split(status) == wanted, f"roles are {wanted}")
        status = moving.client.status()
        told.append(f"{kind}: {answered} answers, then {status.autoscale.words}")
        assert status.autoscale.reversals - before <= 1, "\n".join([*told, moving.tail()])
        assert answered >= 1
    print("", *told, sep="\n")
    workers = moving.at_rest()
    assert {who: worker.info.epoch for who, worker in workers.items()} == epochs
    assert {who: worker.info.pid for who, worker in workers.items()} == pids
    assert loads(moving) == len(pids)
    assert "autoscaler: " in moving.log.read_text()
