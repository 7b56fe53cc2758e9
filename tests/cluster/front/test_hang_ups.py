"""Clients that go away, and servers that do: the answer's generator is closed, which is what frees its blocks."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from cluster.front import grpc_service, http_wire
from cluster.front.grpc_service import serve_grpc
from cluster.front.http import serve_http
from diptych import Client
from diptych.errors import DeadlineExceeded, InvalidRequest

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

HELLO = [{"role": "user", "content": "hello"}]
WAIT_SECONDS = 10


def wait_closed(service: ScriptedService, count: int = 1) -> None:
    """Every generator that was opened has ended; puts them back for the fixture's own count."""
    closed = [service.closed.get(timeout=WAIT_SECONDS) for _ in range(count)]
    for request in closed:
        service.closed.put(request)
    assert sorted(closed) == sorted(ask.id for ask in service.asks)


def test_closing_an_http_stream_closes_its_generator(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 2
    with openai.OpenAI(base_url=f"{wire.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        next(stream)
        service.held.get(timeout=WAIT_SECONDS)
        stream.close()
    wait_closed(service)


@pytest.mark.parametrize("choices", [1, 3])
def test_hanging_up_on_an_unstreamed_answer_closes_its_generators(
    wire: Wire, service: ScriptedService, choices: int
) -> None:
    service.hold_at = 2
    body = {"model": "tiny", "prompt": "hello", "n": choices}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{wire.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_closed(service, choices)


def test_hanging_up_before_the_first_token_closes_the_generator(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 0
    body = {"model": "tiny", "prompt": "hello", "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{wire.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_closed(service)


def test_one_choices_error_closes_the_others(wire: Wire, service: ScriptedService) -> None:
    service.fail_at, service.error = 1, InvalidRequest("no")
    httpx.post(f"{wire.url}/v1/completions", json={"model": "tiny", "prompt": "hello", "n": 4})
    wait_closed(service, 4)


def test_a_client_that_reads_nothing_has_its_stream_ended(
    wire: Wire, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_wire, "STALL_TIMEOUT_SECONDS", 0.3)
    service.answer, service.widen, service.max_context = "x" * 8000, 4096, 8192
    body = b'{"model": "tiny", "prompt": "hello", "stream": true, "n": 2}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", wire.http_port))
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_closed(service, 2)


def test_cancelling_a_grpc_answer_closes_its_generator(client: Client, service: ScriptedService) -> None:
    service.hold_at = 2
    answer = client.generate("hello")
    next(answer)
    service.held.get(timeout=WAIT_SECONDS)
    answer.close()
    wait_closed(service)


def test_a_grpc_client_that_vanishes_closes_its_generator(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 0
    client = Client(wire.target, timeout_seconds=0.3)
    with pytest.raises(DeadlineExceeded):
        list(client.generate("hello"))
    client.close()
    wait_closed(service)


def test_a_grpc_client_that_reads_nothing_has_its_call_ended(
    client: Client, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_service, "STALL_TIMEOUT_SECONDS", 0.3)
    service.answer, service.widen, service.max_context = "x" * 8000, 4096, 8192
    answer = client.generate("hello")
    next(answer)
    wait_closed(service)
    with pytest.raises(DeadlineExceeded, match="read nothing"):
        list(answer)


def test_a_running_requests_id_is_taken_until_it_ends(wire: Wire, client: Client, service: ScriptedService) -> None:
    service.hold_at = 1
    first = client.generate("hello", request_id="mine")
    next(first)
    with Client(wire.target) as other, pytest.raises(InvalidRequest, match="running already"):
        list(other.generate("hello", request_id="mine"))
    first.close()
    wait_closed(service)
    service.hold_at = None
    assert list(client.generate("hello", request_id="mine"))


def test_stopping_the_http_server_ends_a_running_stream_in_bounded_time(wire: Wire, service: ScriptedService) -> None:
    service.hold_at = 2
    server = wire.run(serve_http(service, "127.0.0.1:0"))
    body = {"model": "tiny", "prompt": "hello", "stream": True}
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    with httpx.Client(timeout=30) as client, client.stream("POST", url, json=body) as response:
        assert response.status_code == 200
        service.held.get(timeout=WAIT_SECONDS)
        wire.run(server.stop(1))
    wait_closed(service)
    with pytest.raises(httpx.ConnectError):
        httpx.post(url, json=body)


def test_a_port_in_use_is_an_error_that_names_it(wire: Wire) -> None:
    with pytest.raises(OSError, match=f"127.0.0.1:{wire.http_port}"):
        wire.run(serve_http(wire.service, f"127.0.0.1:{wire.http_port}"))
    with pytest.raises(OSError, match=f"127.0.0.1:{wire.grpc_port}"):
        wire.run(serve_grpc(wire.service, f"127.0.0.1:{wire.grpc_port}"))


def test_the_http_server_leaves_the_processs_signals_alone(service: ScriptedService) -> None:
    def handlers() -> list[object]:
        return [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    async def before_and_during() -> tuple[list[object], list[object]]:
        before = handlers()
        server = await serve_http(service, "127.0.0.1:0")
        during = handlers()
        await server.stop()
        return before, during

    assert threading.current_thread() is threading.main_thread()
    before, during = asyncio.run(before_and_during())
    assert during == before
