"""What the log says of a request: over both protocols the same things, and never what the request says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from queue import Queue
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cluster.front.http import serve_http
from cluster.front.request_log import RequestLog
from cluster.journal import FIELDS
from diptych import Client
from diptych.errors import InvalidRequest, ServingError, UnknownModel, WorkerLost

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

SECRET = "the duck flies at midnight"
WAIT_SECONDS = 20


class Lines(logging.Handler):
    """Everything logged, in order, as soon as it is there."""

    def __init__(self) -> None:
        super().__init__()
        self._records: Queue[logging.LogRecord] = Queue()
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.put(record)

    def next(self) -> tuple[str, str, dict[str, Any]]:
        """Its level, its message and its fields that say something."""
        record = self._records.get(timeout=WAIT_SECONDS)
        self.seen.append(record)
        fields = getattr(record, FIELDS)
        return (
            record.levelname,
            record.getMessage(),
            {name: value for name, value in fields.items() if value is not None},
        )

    def format_all(self) -> str:
        return "\n".join(f"{record.getMessage()} {getattr(record, FIELDS)}" for record in self.seen)


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("cluster.front.request_log")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def chat(wire: Wire, **more: object) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], **more}
    return httpx.post(f"{wire.url}/v1/chat/completions", json=body, timeout=WAIT_SECONDS)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_over_http_is_two_lines_under_the_id_that_its_client_has(
    wire: Wire, lines: Lines, *, stream: bool
) -> None:
    answer = chat(wire, max_tokens=100, n=2, stream=stream)
    name = {"request_id": answer.headers["x-request-id"], "wire": "http", "method": "POST /v1/chat/completions"}
    level, message, begun = lines.next()
    prompt_tokens = begun.pop("prompt_tokens")
    assert (level, message) == ("INFO", "request begins")
    assert begun == {**name, "answers": 2, "max_tokens": 100, "temperature": 1.0}
    level, message, ended = lines.next()
    assert (level, message) == ("INFO", "request ends")
    assert 0 < ended.pop("first_token_seconds") < ended.pop("seconds")
    assert ended == {
        **name,
        "status": 200,
        "finish": "stop",
        "prompt_tokens": prompt_tokens,
        "cached_tokens": 6,
        "completion_tokens": 2 * len("Grüß Gott".encode()),
        "how": "remote",
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
    }


def test_an_answer_over_grpc_is_two_lines_under_the_callers_own_id(client: Client, lines: Lines) -> None:
    list(client.generate(SECRET, request_id="mine", max_tokens=3))
    name = {"request_id": "mine", "wire": "grpc", "method": "Generate"}
    _, message, begun = lines.next()
    assert (message, begun["max_tokens"]) == ("request begins", 3)
    assert begun.items() >= name.items()
    level, _, ended = lines.next()
    assert (level, ended["status"], ended["finish"], ended["completion_tokens"]) == ("INFO", "OK", "length", 2)
    assert ended.items() >= name.items()


def test_no_line_holds_text_of_a_prompt_an_answer_or_a_refused_field(
    wire: Wire, client: Client, lines: Lines, service: ScriptedService
) -> None:
    service.answer = SECRET
    chat(wire)
    list(client.generate(SECRET, max_tokens=100))
    assert chat(wire, stop=[{"text": SECRET}]).status_code == 400
    with pytest.raises(UnknownModel):
        list(client.generate(SECRET, model=SECRET))
    ends = 0
    while ends < 4:
        ends += lines.next()[1] == "request ends"
    assert "duck" not in lines.format_all()
    assert "midnight" not in lines.format_all()


def test_text_is_told_when_it_is_asked_for(wire: Wire, lines: Lines, service: ScriptedService) -> None:
    server = wire.run(serve_http(service, "127.0.0.1:0", log=RequestLog(service.text)))
    body = {"model": "tiny", "prompt": SECRET, "max_tokens": 100}
    httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=WAIT_SECONDS)
    assert lines.next()[2]["prompt"] == SECRET
    assert lines.next()[2]["answer"] == "Grüß Gott"
    wire.run(server.stop())


def test_a_refusal_names_the_field_at_fault(wire: Wire, client: Client, lines: Lines) -> None:
    chat(wire, temperature=-1)
    level, _, ended = lines.next()
    assert (level, ended["status"], ended["error"], ended["param"]) == ("INFO", 400, "invalid_request", "temperature")
    with pytest.raises(InvalidRequest):
        list(client.generate(SECRET, top_p=7))
    level, _, ended = lines.next()
    assert (level, ended["status"], ended["param"]) == ("INFO", "INVALID_ARGUMENT", "sampling.top_p")


def test_a_body_that_is_refused_unread_is_told_too(wire: Wire, lines: Lines) -> None:
    httpx.post(f"{wire.url}/v1/completions", content=b"x", headers={"content-type": "text/plain"})
    level, _, ended = lines.next()
    assert (level, ended["status"], ended["method"]) == ("INFO", 415, "POST /v1/completions")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_on_the_way_is_a_warning_that_says_why(
    wire: Wire, service: ScriptedService, lines: Lines, *, stream: bool
) -> None:
    service.fail_at, service.error = 2, WorkerLost("decode-0 died")
    chat(wire, stream=stream)
    lines.next()
    level, _, ended = lines.next()
    assert (level, ended["status"]) == ("WARNING", 200 if stream else 502)
    assert (ended["error"], ended["reason"], ended["completion_tokens"]) == ("worker_lost", "decode-0 died", 2)


def test_a_bug_is_an_error(wire: Wire, client: Client, service: ScriptedService, lines: Lines) -> None:
    service.fail_at, service.error = 0, ZeroDivisionError()
    chat(wire)
    lines.next()
    level, _, ended = lines.next()
    assert (level, ended["status"], ended["error"]) == ("ERROR", 500, "ZeroDivisionError")
    with pytest.raises(ServingError):
        list(client.generate(SECRET))
    lines.next()
    level, _, ended = lines.next()
    assert (level, ended["status"], ended["error"]) == ("ERROR", "INTERNAL", "ZeroDivisionError")


def test_a_client_that_hangs_up_is_told_as_cancelled(wire: Wire, service: ScriptedService, lines: Lines) -> None:
    service.hold_at = 3
    body = {"model": "tiny", "prompt": SECRET, "stream": True}
    with httpx.stream("POST", f"{wire.url}/v1/completions", json=body, timeout=WAIT_SECONDS):
        service.held.get(timeout=WAIT_SECONDS)
    lines.next()
    level, _, ended = lines.next()
    assert (level, ended["finish"], ended["completion_tokens"]) == ("INFO", "cancelled", 4)


def test_a_call_that_is_cancelled_is_told_so(client: Client, service: ScriptedService, lines: Lines) -> None:
    service.hold_at = 3
    call = client.generate(SECRET)
    next(call)
    service.held.get(timeout=WAIT_SECONDS)
    call.close()
    lines.next()
    _, _, ended = lines.next()
    assert (ended["status"], ended["finish"]) == ("CANCELLED", "cancelled")


def test_a_deadline_that_passes_is_told_as_one(wire: Wire, service: ScriptedService, lines: Lines) -> None:
    service.hold_at = 1
    body = json.dumps({"model": "tiny", "prompt": SECRET})
    headers = {"content-type": "application/json", "x-request-timeout-ms": "50"}
    httpx.post(f"{wire.url}/v1/completions", content=body, headers=headers, timeout=WAIT_SECONDS)
    lines.next()
    level, _, ended = lines.next()
    assert (level, ended["status"], ended["error"]) == ("INFO", 504, "deadline_exceeded")


def test_looking_at_health_and_metrics_is_not_told(wire: Wire, client: Client, lines: Lines) -> None:
    for path in ("/health/ready", "/metrics", "/v1/models", "/version"):
        assert httpx.get(f"{wire.url}{path}").status_code == 200
    client.status()
    httpx.get(f"{wire.url}/nothing")
    _, _, ended = lines.next()
    assert (ended["method"], ended["status"]) == ("GET /nothing", 404)
