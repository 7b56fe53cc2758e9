"""The OpenAI front, asked by OpenAI's own client."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from cluster.front.http import _listen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.conftest import ScriptedService, Wire

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def api(wire: Wire) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{wire.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def events(response: httpx.Response) -> list[dict[str, object]]:
    """The JSON events of a stream, without the closing [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_a_chat_answer_comes_whole_with_its_usage_and_how_it_was_served(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "Grüß Gott"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 11
    assert answer.usage.to_dict()["diptych"] == {
        "how": "remote",
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
        "prompt_tokens_computed": answer.usage.prompt_tokens - 3,
        "cached_tokens": 3,
        "kv_blocks_sent": 2,
        "kv_bytes_sent": 2048,
    }


def test_a_streamed_chat_answer_starts_with_its_role_and_ends_with_its_reason(api: openai.OpenAI) -> None:
    chunks = list(api.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Grüß Gott"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_usage_of_a_stream_comes_last_and_without_choices_when_asked_for(api: openai.OpenAI) -> None:
    options = {"include_usage": True}
    *chunks, last = api.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=options)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 11
    assert last.usage.to_dict()["diptych"]["how"] == "remote"


def test_continuous_usage_counts_the_tokens_of_each_chunk(api: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"stream_options": options, "ignore_eos": True, "stop": None}
    chunks = list(api.completions.create(model="tiny", prompt="hello", stream=True, extra_body=body))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert counts == [1, 2, 4, 6, 7, 8, 9, 10, 11, 11, 11]


def test_a_text_completion_continues_the_prompt_as_it_stands(api: openai.OpenAI, service: ScriptedService) -> None:
    answer = api.completions.create(model="tiny", prompt="hello", max_tokens=3)
    assert answer.choices[0].text == "Gr"
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert service.asks[0].tokens == tuple(b"hello")


def test_a_streamed_text_completion_is_the_whole_one_in_pieces(api: openai.OpenAI) -> None:
    chunks = list(api.completions.create(model="tiny", prompt="hello", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Grüß Gott"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
    ],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
def test_a_prompt_may_be_text_or_tokens_one_or_several(
    api: openai.OpenAI, service: ScriptedService, prompt: str | list[str], tokens: list[bytes]
) -> None:
    answer = api.completions.create(model="tiny", prompt=prompt)
    assert [ask.tokens for ask in service.asks] == [tuple(one) for one in tokens]
    assert [choice.index for choice in answer.choices] == list(range(len(tokens)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, tokens))


def test_every_choice_of_every_prompt_has_an_id_and_noise_of_its_own(
    api: openai.OpenAI, service: ScriptedService
) -> None:
    answer = api.completions.create(model="tiny", prompt=["abcd", "efghi"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [(bytes(ask.tokens), ask.choice) for ask in service.asks] == [
        (b"abcd", 0),
        (b"abcd", 1),
        (b"efghi", 0),
        (b"efghi", 1),
    ]
    assert len({ask.id for ask in service.asks}) == 4
    assert len({ask.params.seed for ask in service.asks}) == 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.completion_tokens == 44
    assert answer.usage.to_dict()["diptych"]["kv_blocks_sent"] == 8
    assert answer.usage.to_dict()["diptych"]["prefill_worker"] == "prefill-0"


def test_several_streamed_choices_each_have_a_role_and_an_end(api: openai.OpenAI) -> None:
    chunks = list(api.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=3))
    for index in range(3):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == "Grüß Gott"
        assert own[-1].finish_reason == "stop"


def test_what_the_client_leaves_out_takes_openais_defaults(api: openai.OpenAI, service: ScriptedService) -> None:
    api.completions.create(model="tiny", prompt="hello")
    api.completions.create(model="tiny", prompt="hello")
    first, second = (ask.params for ask in service.asks)
    assert (first.temperature, first.top_p, first.top_k) == (1.0, 1.0, 0)
    assert first.max_tokens == 512 - 5
    assert set(first.stop_token_ids) == service.text.eos_token_ids
    assert first.seed != second.seed


def test_what_the_client_sets_reaches_the_engine(api: openai.OpenAI, service: ScriptedService) -> None:
    body = {"top_k": 7, "stop_token_ids": [9], "ignore_eos": True, "diptych": {"fingerprint": True}}
    api.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_completion_tokens=20,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        stop=["\n", "END"],
        extra_body=body,
    )
    [ask] = service.asks
    assert ask.stop == ("\n", "END")
    assert (ask.params.max_tokens, ask.params.temperature, ask.params.top_p) == (20, 0.5, 0.9)
    assert (ask.params.top_k, ask.params.seed, ask.params.stop_token_ids) == (7, 2**64 - 1, (9,))
    assert ask.params.fingerprint


def test_null_is_absent_and_what_only_says_who_asks_is_ignored(wire: Wire, service: ScriptedService) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello", "name": None, "tool_calls": None}],
        "max_tokens": None,
        "stop": None,
        "logprobs": False,
        "tools": [],
        "logit_bias": {},
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "user": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "top_k": -1,
    }
    response = httpx.post(f"{wire.url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert service.asks[0].params.top_k == 0


def test_text_parts_and_the_developers_turn_read_as_plain_messages(
    api: openai.OpenAI, service: ScriptedService
) -> None:
    parts = [{"type": "text", "text": "hello"}]
    api.chat.completions.create(
        model="tiny", messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    )
    api.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "be brief"}, *HELLO])
    assert service.asks[0].tokens == service.asks[1].tokens


def test_an_answer_sent_back_as_a_turn_is_taken(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=HELLO)
    turns = [*HELLO, answer.choices[0].message.to_dict(), {"role": "user", "content": "and?"}]
    assert api.chat.completions.create(model="tiny", messages=turns).choices[0].finish_reason == "stop"


def test_fingerprints_come_in_hexadecimal_beside_their_tokens(wire: Wire) -> None:
    body = {"model": "tiny", "prompt": "hello", "diptych": {"fingerprint": True}}
    whole = httpx.post(f"{wire.url}/v1/completions", json=body).json()["choices"][0]["diptych"]
    streamed = events(httpx.post(f"{wire.url}/v1/completions", json={**body, "stream": True}))
    pieces = [event["choices"][0]["diptych"] for event in streamed if "diptych" in event["choices"][0]]
    assert bytes(whole["token_ids"]).decode() == "Grüß Gott"
    assert [len(bytes.fromhex(one)) for one in whole["fingerprints"]] == [32] * 11
    assert [one for piece in pieces for one in piece["fingerprints"]] == whole["fingerprints"]
    assert [one for piece in pieces for one in piece["token_ids"]] == whole["token_ids"]


def test_the_response_names_its_request(wire: Wire) -> None:
    response = httpx.post(f"{wire.url}/v1/completions", json={"model": "tiny", "prompt": "hello"})
    assert response.headers["x-request-id"] == response.json()["id"]
    assert httpx.get(f"{wire.url}/health").headers["x-request-id"]


def test_models_are_listed_and_found(api: openai.OpenAI) -> None:
    [model] = api.models.list().data
    assert model.id == "tiny"
    assert api.models.retrieve("tiny").to_dict()["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("some/other")


def test_readiness_follows_the_service_and_liveness_does_not(wire: Wire, service: ScriptedService) -> None:
    def codes() -> list[int]:
        return [httpx.get(f"{wire.url}/health{path}").status_code for path in ("", "/ready", "/live")]

    assert codes() == [200, 200, 200]
    service.ready = False
    assert codes() == [503, 503, 200]


def test_the_version_is_the_packages(wire: Wire) -> None:
    from diptych import __version__

    assert httpx.get(f"{wire.url}/version").json() == {"version": __version__}


def test_a_connections_bytes_leave_at_once() -> None:
    with _listen("127.0.0.1:0", beside=False) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
