"""A request that is given up at any stage leaves nothing behind on either side, within a step of the engine."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

import grpc
import pytest

from diptych.v1.inference_pb2 import GenerateRequest, Sampling, TokenIds
from diptych.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from diptych.v1.admin_pb2 import GetStatusResponse, WorkerStatus
    from tests.e2e.conftest import Cluster

pytestmark = pytest.mark.e2e

PROMPT_TOKENS = 800
BLOCKS = PROMPT_TOKENS // 16
"""Of a worker's 96: two such requests don't fit beside each other."""
MAX_TOKENS = 700

HangUp = Callable[[], object]
Ask = Callable[[list[int]], HangUp]
"""Sends a request; what it returns gives it up."""


@contextmanager
def over_grpc(cluster: Cluster) -> Iterator[Ask]:
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = InferenceServiceStub(channel)

        def ask(prompt: list[int]) -> HangUp:
            sampling = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)
            return stub.Generate(GenerateRequest(token_ids=TokenIds(ids=prompt), sampling=sampling)).cancel

        yield ask


@contextmanager
def over_http(cluster: Cluster) -> Iterator[Ask]:
    """By sockets that close, as a browser's do."""
    host, _, port = cluster.http.rpartition(":")
    with ExitStack() as sockets:

        def ask(prompt: list[int]) -> HangUp:
            connection = sockets.enter_context(socket.create_connection((host, int(port))))
            asked = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True}
            body = json.dumps({"model": "smollm2-135m-instruct", **asked})
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            return connection.close

        yield ask


def test_a_request_cancelled_at_any_stage_gives_its_blocks_back_on_both_sides(
    exact: Cluster, connected: Callable[[Cluster], AbstractContextManager[Ask]]
) -> None:
    with connected(exact) as ask:
        before = Sides(exact.at_rest())
        stages(Scene(exact, before, random.Random(before.prefill.counters.steps)), ask)
    after = Sides(exact.at_rest())  # every block is free or cached, on both sides

    assert after.grown(before, "decode", "requests_cancelled") == 4, "one was with no worker yet"
    assert after.grown(before, "prefill", "requests_cancelled") == 3, "the one that decoded was none of its any more"
    assert after.grown(before, "decode", "requests_finished") == 0
    assert after.grown(before, "decode", "transfers_committed") == 1
    assert after.grown(before, "decode", "transfers_failed") == 0
    waited = {worker.info.id: worker.counters.cancel_steps_max for worker in (after.prefill, after.decode)}
    print(f"\n5: engine steps between a cancel's arrival and the release of its blocks, at most: {waited}")
    assert all(steps <= 1 for steps in waited.values())


@pytest.fixture(params=[over_grpc, over_http], ids=["grpc", "http"])
def connected(request: pytest.FixtureRequest) -> Callable[[Cluster], AbstractContextManager[Ask]]:
    return request.param


def stages(scene: Scene, ask: Ask) -> None:
    """One request, and around it others that are given up wherever a request can be."""
    answer = ask(scene.prompt())
    scene.until("the first is computed", lambda prefill, _: prefill.load.running_requests == 1)

    queued = ask(scene.prompt())
    scene.until_waiting("the next waits for its turn", 1)
    queued()
    now = scene.until_waiting("it is gone", 0)
    assert now.prefill.load.running_requests == 1, "the first is still being computed"
    assert now.grown(scene.before, "prefill", "prompt_tokens_computed") < PROMPT_TOKENS
    scene.until("the first decodes", lambda _, decode: decode.load.running_requests == 1)

    prefilling = ask(scene.prompt())
    scene.until(
        "part of it is computed, and decode has no room for it",
        lambda prefill, decode: (
            prefill.load.waiting_tokens > 0
            and decode.load.waiting_requests == 1
            and prefill.counters.prompt_tokens_computed
            > scene.before.prefill.counters.prompt_tokens_computed + PROMPT_TOKENS
        ),
    )
    prefilling()
    now = scene.until("it is gone", lambda prefill, _: prefill.load.running_requests == 0)
    assert PROMPT_TOKENS < now.grown(scene.before, "prefill", "prompt_tokens_computed") < 2 * PROMPT_TOKENS
    assert now.grown(scene.before, "prefill", "blocks_sent") == BLOCKS, "the first's"

    computed = ask(scene.prompt())
    scene.until("its KV waits for room", lambda prefill, _: prefill.load.blocks_lent == BLOCKS)
    computed()
    scene.until("it is gone", lambda prefill, _: prefill.load.blocks_lent == 0)

    answer()
    now = scene.until("nobody decodes", lambda _, decode: decode.load.running_requests == 0)
    assert now.grown(scene.before, "decode", "tokens_emitted") > 0

    transferring = ask(scene.prompt())
    scene.until(
        "some of its KV crossed",
        lambda _, decode: decode.counters.blocks_received > now.decode.counters.blocks_received,
    )
    transferring()


class Sides:
    """Prefill and decode at one moment."""

    def __init__(self, workers: Mapping[str, WorkerStatus]) -> None:
        self.prefill, self.decode = workers["prefill-0"], workers["decode-0"]

    def grown(self, since: Sides, role: Literal["prefill", "decode"], counter: str) -> int:
        now, then = getattr(self, role).counters, getattr(since, role).counters
        return getattr(now, counter) - getattr(then, counter)


class Scene:
    """A cluster whose every wait is for what its status says."""

    def __init__(self, cluster: Cluster, before: Sides, dice: random.Random) -> None:
        self.before = before
        self._cluster = cluster
        self._dice = dice

    def prompt(self) -> list[int]:
        """One that nobody has seen."""
        return self._dice.choices(range(1000, 40000), k=PROMPT_TOKENS)

    def until(self, what: str, true: Callable[[WorkerStatus, WorkerStatus], bool]) -> Sides:
        """The first moment at which it is true."""

        def holds(status: GetStatusResponse) -> bool:
            sides = Sides({worker.info.id: worker for worker in status.workers})
            return true(sides.prefill, sides.decode)

        return self._sides(self._cluster.until(holds, what))

    def until_waiting(self, what: str, count: int) -> Sides:
        """The first moment at which so many are placed nowhere."""
        return self._sides(
            self._cluster.until(lambda status: sum(queue.length for queue in status.queues) == count, what)
        )

    def _sides(self, status: GetStatusResponse) -> Sides:
        return Sides({worker.info.id: worker for worker in status.workers})
