"""Who waits and for how long, from the wire to a real engine: priorities over both protocols, and a call's deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from diptych import Client
from diptych.errors import DeadlineExceeded
from diptych.types import (
    FrontId,
    ModelSource,
    Outgoing,
    Placement,
    Report,
    Request,
    RequestId,
    WorkerId,
    WorkerInfo,
    WorkerSpec,
)
from workers.worker import Worker

if TYPE_CHECKING:
    from cluster.front.tokenizer import TextModel

WAIT_SECONDS = 30
TINY = ModelSource(name="tiny", path="random:tiny", digest="abcdef0123456789")


@dataclass
class Port:
    """cluster.front.dispatcher.WorkerPort over a worker of this process; notes who is served when."""

    worker: Worker
    reports: list[Report] = field(default_factory=list[Report])
    requests: dict[RequestId, Request] = field(default_factory=dict[RequestId, Request])
    served: list[RequestId] = field(default_factory=list[RequestId])

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None:
        self.requests[request.id] = request
        await self.worker.submit(request, attempt, placement)

    async def cancel(self, request: RequestId, attempt: int) -> None:
        await self.worker.cancel(request, attempt)

    async def owns(self, request: RequestId, attempt: int) -> bool:
        return self.worker.owns(request, attempt)

    async def outbox(self, front: FrontId) -> AsyncGenerator[tuple[Outgoing, ...], None]:
        async for items in self.worker.outbox(front):
            self.served = list(dict.fromkeys([*self.served, *(item.request for item in items)]))
            yield items

    async def note(self, report: Report) -> bool:
        self.reports.append(report)
        return False

    async def stop(self) -> None:
        assert await self.worker.stop()

    def until_submitted(self, count: int) -> None:
        """So many requests are on their way to the engine."""
        deadline = time.monotonic() + WAIT_SECONDS
        while len(self.requests) < count:
            assert time.monotonic() < deadline, f"{len(self.requests)} of {count} requests came"
            threading.Event().wait(0.01)

    def until(self, true: Callable[[Report], bool], what: str) -> None:
        """The worker says that it is so."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (self.reports and true(self.reports[-1])):
            assert time.monotonic() < deadline, f"waited {WAIT_SECONDS} s until {what}: {self.reports[-1:]}"
            threading.Event().wait(0.02)


@dataclass(frozen=True)
class House:
    """One worker that runs one request at a time, and the front before it."""

    url: str
    target: str
    port: Port


@pytest.fixture
def house(front_over: Callable[..., Any], byte_text: TextModel) -> Iterator[House]:
    spec = WorkerSpec(
        id=WorkerId("w"),
        role="mixed",
        epoch=0,
        model=TINY,
        dtype="fp32",
        block_size=16,
        memory_bytes=16 << 20,
        max_batch_tokens=256,
        max_running=1,
        threads=1,
        device="cpu",
        host="127.0.0.1",
        link="gloo",
        wire="native",
        verify="off",
        secret=b"s" * 16,
        lease_seconds=10.0,
        cache="",
    )
    ports: list[Port] = []

    async def start() -> tuple[WorkerInfo, Port]:
        port = Port(Worker(spec))
        info = await port.worker.start()
        port.worker.report_to(port.note)
        ports.append(port)
        return info, port

    threads = torch.get_num_threads()
    with front_over(byte_text, start) as stack:
        yield House(stack.url, stack.target, ports[0])
    torch.set_num_threads(threads)


def test_priorities_of_both_protocols_order_one_queue(house: House) -> None:
    endless = {"max_tokens": 4000, "ignore_eos": True}

    def over_grpc(**wishes: Any) -> None:
        with Client(house.target, timeout_seconds=WAIT_SECONDS) as client:
            list(client.generate("hello", max_tokens=2, **wishes))

    def over_http(**fields: Any) -> None:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 2, **fields}
        httpx.post(f"{house.url}/v1/completions", json=body, timeout=WAIT_SECONDS).raise_for_status()

    with Client(house.target) as client, ThreadPoolExecutor() as threads:
        running = client.generate("hello", priority=9, **endless)
        next(running)
        # Between two steps, until all are here: the first one must not end before.
        gate = threading.Event()
        house.port.worker._engine.post(gate.wait, WAIT_SECONDS)
        calls = []
        for waiting, (send, fields) in enumerate(
            [
                (over_http, {"priority": 3}),
                (over_grpc, {}),
                (over_grpc, {"priority": 2}),
                (over_http, {"priority": -(2**31)}),
                (over_http, {"priority": None}),
                (over_grpc, {"priority": -5}),
            ]
        ):
            calls.append(threads.submit(send, **fields))
            house.port.until_submitted(waiting + 2)
        gate.set()
        running.close()
        for call in calls:
            call.result(WAIT_SECONDS)
    port = house.port
    assert [port.requests[request].priority for request in port.served] == [9, -(2**31), -5, 0, 0, 2, 3]
    _, _, _, first, second, _, _ = (port.requests[request].arrived for request in port.served)
    assert first < second, "equals are served in the order of arrival"


def test_a_grpc_calls_deadline_ends_its_request_at_the_worker_running_or_waiting(house: House) -> None:
    with Client(house.target, timeout_seconds=0.5) as hasty, ThreadPoolExecutor() as threads:
        calls = [
            threads.submit(lambda: list(hasty.generate("hello", max_tokens=8000, ignore_eos=True))) for _ in range(2)
        ]
        for call in calls:
            with pytest.raises(DeadlineExceeded):
                call.result(WAIT_SECONDS)
    house.port.until(
        lambda told: (
            (told.counters.requests_cancelled, told.load.running_requests, told.load.waiting_requests) == (2, 0, 0)
        ),
        "both are over at the worker",
    )
    load = house.port.reports[-1].load
    assert (load.blocks_held, load.blocks_granted, load.blocks_lent) == (0, 0, 0)
    assert house.port.reports[-1].counters.requests_finished == 0
