"""What the OpenAI front refuses, and in which words: OpenAI's error shape, the field named."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from cluster.front import http_wire
from diptych.errors import (
    DeadlineExceeded,
    Draining,
    Internal,
    InvalidRequest,
    NoWorker,
    Overloaded,
    ServingError,
    WorkerLost,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.conftest import ScriptedService, Wire

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "tiny", "prompt": "hello"}


@pytest.fixture(autouse=True)
def _the_next_request_is_answered(wire: Wire) -> Iterator[None]:
    yield
    wire.service.fail_at = None
    response = httpx.post(f"{wire.url}/v1/completions", json=TEXT, timeout=30)
    assert response.json()["choices"][0]["text"] == wire.service.answer


def refusal(response: httpx.Response) -> dict[str, object]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 3.5}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 300]}, "stop"),
        ({"stop_token_ids": [260]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"includeUsage": True}}, "stream_options.includeUsage"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"260": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias[5]"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.1}, "repetition_penalty"),
        ({"repetition_penalty": 1000}, "repetition_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 10_000}, "min_tokens"),
        ({"priority": 2**31}, "priority"),
        ({"priority": -(2**31) - 1}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [260]}, "allowed_token_ids"),
        ({"allowed_token_ids": [120], "bad_words": ["x"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [257], "min_tokens": 1}, "min_tokens"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"echo": True}, "echo"),
        ({"diptych": {"fingerprints": True}}, "diptych.fingerprints"),
        ({"temprature": 0.5}, "temprature"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_chat_field_is_refused_by_name(wire: Wire, change: dict[str, object], param: str) -> None:
    response = httpx.post(f"{wire.url}/v1/chat/completions", json={**CHAT, **change})
    assert response.status_code == 400
    error = refusal(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": "a" * 512}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": 1}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": CHAT["messages"]}, "messages"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_completion_field_is_refused_by_name(wire: Wire, change: dict[str, object], param: str) -> None:
    response = httpx.post(f"{wire.url}/v1/completions", json={**TEXT, **change})
    assert response.status_code == 400
    assert refusal(response)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny"} {}',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": ' + b"[" * 100_000,
        b'{"model": "tiny", "prompt": "a", "metadata": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
        b"[]",
        b'"prompt"',
        b"null",
    ],
    ids=lambda body: repr(body[:60]),
)
def test_a_body_that_is_no_json_object_is_refused(wire: Wire, body: bytes) -> None:
    response = httpx.post(f"{wire.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    refusal(response)


def test_too_many_tokens_are_refused_with_the_numbers(wire: Wire) -> None:
    error = refusal(httpx.post(f"{wire.url}/v1/completions", json={**TEXT, "max_tokens": 600}))
    assert error["code"] == "context_length_exceeded"
    assert "605" in str(error["message"])
    assert "512" in str(error["message"])
    assert "507" in str(error["message"])


def test_another_model_is_not_found(wire: Wire) -> None:
    response = httpx.post(f"{wire.url}/v1/chat/completions", json={**CHAT, "model": "gpt-9"})
    assert response.status_code == 404
    assert refusal(response)["code"] == "model_not_found"
    assert refusal(response)["param"] == "model"


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_refused(wire: Wire, media_type: str) -> None:
    response = httpx.post(f"{wire.url}/v1/completions", content=b"{}", headers={"content-type": media_type})
    assert response.status_code == 415
    refusal(response)


def test_a_body_over_the_limit_is_refused(wire: Wire) -> None:
    response = httpx.post(f"{wire.url}/v1/completions", json={**TEXT, "prompt": "a" * (8 << 20)})
    assert response.status_code == 413
    assert str(8 << 20) in str(refusal(response)["message"])


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(wire: Wire) -> None:
    nowhere = httpx.get(f"{wire.url}/v1/nowhere")
    wrong_method = httpx.get(f"{wire.url}/v1/completions")
    assert (nowhere.status_code, refusal(nowhere)["code"]) == (404, "not_found")
    assert (wrong_method.status_code, refusal(wrong_method)["code"]) == (405, "method_not_allowed")


def test_openais_client_raises_its_own_errors(wire: Wire) -> None:
    with openai.OpenAI(base_url=f"{wire.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**CHAT, temperature=5)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-9", prompt="x")


ERRORS = [
    (InvalidRequest("no", param="x"), 400),
    (Overloaded("full", retry_after=2.5), 429),
    (NoWorker("none"), 503),
    (Draining("bye"), 503),
    (WorkerLost("gone"), 502),
    (DeadlineExceeded("late"), 504),
    (Internal("oops"), 500),
]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_own_status(
    wire: Wire, service: ScriptedService, error: ServingError, status: int, stream: bool
) -> None:
    service.fail_at, service.error = 0, error
    response = httpx.post(f"{wire.url}/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert refusal(response)["message"] == str(error)
    if isinstance(error, Overloaded):
        assert int(response.headers["retry-after"]) >= error.retry_after


@pytest.mark.parametrize("choices", [1, 3])
def test_an_error_in_mid_stream_ends_it_without_a_made_up_reason(
    wire: Wire, service: ScriptedService, choices: int
) -> None:
    service.fail_at, service.error = 3, WorkerLost("decode-0 is gone")
    response = httpx.post(f"{wire.url}/v1/chat/completions", json={**CHAT, "stream": True, "n": choices})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert json.loads(lines[-1])["error"]["code"] == "worker_lost"
    assert not any(choice["finish_reason"] for line in lines[:-1] for choice in json.loads(line)["choices"])


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_hears_of_an_error_in_mid_answer(wire: Wire, service: ScriptedService, stream: bool) -> None:
    service.fail_at, service.error = 3, WorkerLost("decode-0 is gone")
    with (
        openai.OpenAI(base_url=f"{wire.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="decode-0 is gone"),
    ):
        list(client.completions.create(**TEXT, stream=stream))


@pytest.mark.parametrize("fail_at", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_answered_with_the_requests_id_and_none_of_its_words(
    wire: Wire, service: ScriptedService, fail_at: int, stream: bool
) -> None:
    service.fail_at, service.error = fail_at, LookupError("secret")
    response = httpx.post(f"{wire.url}/v1/completions", json={**TEXT, "stream": stream})
    last = response.text.rstrip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] in json.loads(last)["error"]["message"]
    assert "secret" not in response.text


def test_a_body_that_trickles_in_is_given_up(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_wire, "BODY_TIMEOUT_SECONDS", 0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", wire.http_port), timeout=20) as slow:
        slow.sendall(head + b'{"model": ')
        answer = b""
        while b'"code":"timeout"' not in answer and (piece := slow.recv(4096)):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"0.3 s" in answer


@pytest.mark.parametrize(
    "noise",
    [
        b"\x00\xff" * 100 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\nconnection: close\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost x\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda noise: repr(noise[:40]),
)
def test_what_is_no_http_is_a_400(wire: Wire, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", wire.http_port), timeout=20) as stranger:
        stranger.sendall(noise)
        answer = b""
        with suppress(ConnectionResetError):  # what wasn't read when the server hung up
            while piece := stranger.recv(4096):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 4")
