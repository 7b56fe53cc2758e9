"""Workers killed outright: prefill's death costs no answer, decode's ends its answers in words, both come back."""

from __future__ import annotations

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from diptych.errors import WorkerLost

if TYPE_CHECKING:
    from diptych.v1.admin_pb2 import GetStatusResponse, WorkerStatus
    from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.e2e

STREAMS = 8
WAIT_SECONDS = 60


def worker_of(status: GetStatusResponse, worker: str) -> WorkerStatus:
    return next(one for one in status.workers if one.info.id == worker)


def kill(cluster: Cluster, worker: str) -> None:
    status = worker_of(cluster.client.status(), worker)
    assert status.alive
    os.kill(status.info.pid, signal.SIGKILL)


def until_replaced(cluster: Cluster, worker: str, epoch: int) -> None:
    def is_back(status: GetStatusResponse) -> bool:
        return any(one.info.id == worker and one.info.epoch > epoch and one.alive for one in status.workers)

    cluster.until(is_back, f"{worker} is replaced")


def test_a_killed_prefill_worker_costs_no_answer_and_is_replaced(tiny: Cluster) -> None:
    prefill, dice = worker_of(tiny.client.status(), "prefill-0"), random.Random(1)
    epoch, sent = prefill.info.epoch, prefill.counters.blocks_sent
    asks = [{"tokens": dice.choices(range(3, 256), k=4000), "max_tokens": 24} for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as threads:
        running = [threads.submit(tiny.answer, **ask) for ask in asks]
        tiny.until(lambda status: worker_of(status, "prefill-0").counters.blocks_sent > sent, "KV is on its way")
        kill(tiny, "prefill-0")
        answers = [each.result(WAIT_SECONDS) for each in running]
    ways = [answer.served.how for answer in answers]
    print(f"\nprefill killed: {ways.count('remote')} answers were handed over, {ways.count('local')} recovered")
    assert "local" in ways, "it was killed too late to matter"

    until_replaced(tiny, "prefill-0", epoch)
    again = [tiny.answer(**ask) for ask in asks]
    assert {answer.served.how for answer in again} == {"remote"}
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in again]
    tiny.at_rest()


def test_a_killed_decode_worker_ends_its_answers_in_words_and_is_replaced(tiny: Cluster) -> None:
    epoch = worker_of(tiny.client.status(), "decode-0").info.epoch
    begun = Barrier(STREAMS + 2)

    def over_grpc(place: int) -> None:
        stream = tiny.client.generate(f"Stream {place}", max_tokens=7000, ignore_eos=True)
        heard = [next(stream), next(stream)]
        begun.wait(WAIT_SECONDS)
        for response in stream:
            heard.append(response)
            assert not response.HasField("complete")

    def over_http() -> list[str]:
        body = {"model": "random:tiny", "prompt": "Stream", "max_tokens": 7000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"http://{tiny.http}/v1/completions", json=body, timeout=WAIT_SECONDS) as response:
            lines = response.iter_lines()
            heard = [next(lines)]
            begun.wait(WAIT_SECONDS)
            return heard + list(lines)

    with ThreadPoolExecutor(STREAMS + 1) as threads:
        running: list[Any] = [threads.submit(over_grpc, place) for place in range(STREAMS)]
        events = threads.submit(over_http)
        begun.wait(WAIT_SECONDS)
        kill(tiny, "decode-0")
        for each in running:
            with pytest.raises(WorkerLost, match="decode-0"):
                each.result(WAIT_SECONDS)
        *_, error = [line for line in events.result(WAIT_SECONDS) if line.startswith("data: {")]
        assert "decode-0" in error
        assert '"error"' in error

    until_replaced(tiny, "decode-0", epoch)
    answer = tiny.answer(prompt="And on it goes", max_tokens=8)
    assert (answer.served.how, len(answer.tokens)) == ("remote", 8)
    tiny.at_rest()
