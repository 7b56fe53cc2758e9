"""/tokenize and /detokenize in vLLM's shapes, and a request's own deadline over HTTP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.cluster.conftest import ScriptedService, Wire

HELLO = [{"role": "user", "content": "hello"}]
WAIT_SECONDS = 10


def post(wire: Wire, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{wire.url}{path}", json=body, headers=headers, timeout=30)


def test_a_text_is_tokenised_as_it_stands(wire: Wire) -> None:
    said = post(wire, "/tokenize", {"model": "tiny", "prompt": "ab", "return_token_strs": True}).json()
    assert said == {"count": 2, "max_model_len": 512, "tokens": [97, 98], "token_strs": ["a", "b"]}
    assert post(wire, "/tokenize", {"prompt": "ab"}).json()["token_strs"] is None


def test_a_conversation_is_tokenised_as_a_chat_completion_would_be(wire: Wire, service: ScriptedService) -> None:
    said = post(wire, "/tokenize", {"messages": HELLO, "add_generation_prompt": True}).json()
    post(wire, "/v1/chat/completions", {"model": "tiny", "messages": HELLO})
    assert tuple(said["tokens"]) == service.asks[0].tokens


def test_tokens_become_the_text_they_came_from(wire: Wire) -> None:
    tokens = post(wire, "/tokenize", {"prompt": "Grüß Gott 🙂"}).json()["tokens"]
    assert post(wire, "/detokenize", {"tokens": tokens}).json() == {"prompt": "Grüß Gott 🙂"}
    assert post(wire, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, None),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": HELLO, "prompt": "a"}, "prompt"),
        ("/tokenize", {"prompt": "a", "promt": "b"}, "promt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**70]}, "tokens"),
    ],
)
def test_what_is_wrong_is_refused_by_name(wire: Wire, path: str, body: dict[str, Any], param: str | None) -> None:
    response = httpx.post(
        f"{wire.url}{path}", content=json.dumps(body), headers={"content-type": "application/json"}, timeout=30
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found(wire: Wire, path: str) -> None:
    assert (
        post(
            wire, path, {"model": "gpt-9", "prompt": "a"} if path == "/tokenize" else {"model": "gpt-9", "tokens": []}
        ).status_code
        == 404
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_at", [0, 3])
def test_an_answer_ends_at_its_requests_deadline(
    wire: Wire, service: ScriptedService, stream: bool, hold_at: int
) -> None:
    service.hold_at = hold_at
    body = {"model": "tiny", "prompt": "hello", "stream": stream}
    response = post(wire, "/v1/completions", body, **{"x-request-timeout-ms": "300"})
    last = json.loads(response.text.rstrip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"
    assert response.status_code == (200 if stream and hold_at else 504)
    service.closed.put(service.closed.get(timeout=WAIT_SECONDS))


def test_a_deadline_that_is_far_away_changes_nothing(wire: Wire) -> None:
    body = {"model": "tiny", "prompt": "hello"}
    answer = post(wire, "/v1/completions", body, **{"x-request-timeout-ms": "60000"})
    assert answer.json()["choices"][0]["text"] == "Grüß Gott"


@pytest.mark.parametrize("said", ["0", "-1", "1.5", "soon", "", "99999999999999", "٣"])
def test_a_deadline_that_is_no_number_of_milliseconds_is_refused(wire: Wire, said: str) -> None:
    headers = {b"x-request-timeout-ms": said.encode(), b"content-type": b"application/json"}
    response = httpx.post(f"{wire.url}/v1/completions", content=b'{"model":"tiny","prompt":"a"}', headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout-ms"
