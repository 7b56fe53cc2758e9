"""Workers killed outright: prefill's death costs no answer, nor does decode's, and both come back."""

from __future__ import annotations

import json
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

import httpx
import pytest

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
    asks = [{"tokens": dice.choices(range(3, 256), k=4000), "max_tokens": 24} for _ in range(3 * STREAMS)]
    with ThreadPoolExecutor(len(asks)) as threads:
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


def test_a_killed_decode_worker_costs_a_pause_and_no_token(tiny: Cluster) -> None:
    """The cluster's only one: its answers wait for its successor, over both protocols, streamed or not."""
    epoch = worker_of(tiny.client.status(), "decode-0").info.epoch
    begun = Barrier(STREAMS + 2)
    length = 1500

    def over_grpc(place: int, *, waits: bool) -> tuple[int, ...]:
        stream = tiny.client.generate(f"Stream {place}", max_tokens=length, ignore_eos=True, seed=place)
        heard = [next(stream), next(stream)]
        if waits:
            begun.wait(WAIT_SECONDS)
        return tuple(token for response in (*heard, *stream) for token in response.chunk.token_ids)

    def over_http(*, waits: bool, stream: bool) -> str:
        body = {"model": "random:tiny", "prompt": "Stream", "max_tokens": length, "ignore_eos": True, "seed": 5}
        if waits and not stream:
            begun.wait(WAIT_SECONDS)
        with httpx.stream(
            "POST", f"http://{tiny.http}/v1/completions", json={**body, "stream": stream}, timeout=WAIT_SECONDS
        ) as response:
            assert response.status_code == 200
            if not stream:
                return json.loads(response.read())["choices"][0]["text"]
            lines = response.iter_lines()
            heard = [next(lines)]
            if waits:
                begun.wait(WAIT_SECONDS)
            events = [json.loads(line[6:]) for line in (*heard, *lines) if line.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events)

    undisturbed = [over_grpc(place, waits=False) for place in range(STREAMS)]
    text = over_http(waits=False, stream=False)
    with ThreadPoolExecutor(STREAMS + 1) as threads:
        running = [threads.submit(over_grpc, place, waits=True) for place in range(STREAMS)]
        events = threads.submit(over_http, waits=True, stream=True)
        begun.wait(WAIT_SECONDS)
        kill(tiny, "decode-0")
        answers = [each.result(WAIT_SECONDS) for each in running]
        heard = events.result(WAIT_SECONDS)
    assert answers == undisturbed
    assert heard == text
    assert len(answers[0]) == length

    until_replaced(tiny, "decode-0", epoch)
    answer = tiny.answer(prompt="And on it goes", max_tokens=8)
    assert (answer.served.how, len(answer.tokens)) == ("remote", 8)
    tiny.at_rest()
