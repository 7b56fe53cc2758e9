"""Sampling parameters from the wire to a real engine and back: OpenAI's client over HTTP, ours over gRPC."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch

from diptych import Client
from diptych.errors import InvalidRequest
from diptych.types import (
    FrontId,
    ModelSource,
    Outgoing,
    Placement,
    Request,
    RequestId,
    WorkerId,
    WorkerInfo,
    WorkerSpec,
)
from workers.worker import Worker

if TYPE_CHECKING:
    from cluster.front.tokenizer import TextModel

PROMPT = "once upon"
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0.0}
TINY = ModelSource(name="tiny", path="random:tiny", digest="abcdef0123456789")


@dataclass(frozen=True)
class Port:
    """cluster.front.dispatcher.WorkerPort over a worker of this process."""

    worker: Worker

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None:
        await self.worker.submit(request, attempt, placement)

    async def cancel(self, request: RequestId, attempt: int) -> None:
        await self.worker.cancel(request, attempt)

    async def owns(self, request: RequestId, attempt: int) -> bool:
        return self.worker.owns(request, attempt)

    def outbox(self, front: FrontId) -> AsyncGenerator[tuple[Outgoing, ...], None]:
        return self.worker.outbox(front)

    async def stop(self) -> None:
        assert await self.worker.stop()


@pytest.fixture(scope="module")
def stack(front_over: Callable[..., Any], byte_text: TextModel) -> Iterator[Any]:
    spec = WorkerSpec(
        id=WorkerId("w"),
        role="mixed",
        epoch=0,
        model=TINY,
        dtype="fp32",
        block_size=16,
        memory_bytes=4 << 20,
        max_batch_tokens=256,
        max_running=16,
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

    async def start() -> tuple[WorkerInfo, Port]:
        worker = Worker(spec)
        return await worker.start(), Port(worker)

    threads = torch.get_num_threads()
    with front_over(byte_text, start) as stack:
        yield stack
    torch.set_num_threads(threads)


@pytest.fixture
def api(stack: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as api:
        yield api


@pytest.fixture
def client(stack: Any) -> Iterator[Client]:
    with Client(stack.target) as client:
        yield client


def greedy_tokens(client: Client, count: int = 12, **wishes: Any) -> list[int]:
    return tokens_of(client.generate(PROMPT, max_tokens=count, temperature=0, **wishes))


def tokens_of(responses: Iterator[Any]) -> list[int]:
    return [token for response in responses for token in response.chunk.token_ids]


# ---- parameters ------------------------------------------------------------------------------------------


def test_every_parameter_changes_the_answer_the_same_way_over_both_wires(api: openai.OpenAI, client: Client) -> None:
    plain = greedy_tokens(client)
    first, third = plain[0], plain[2]
    others = [token for token in range(97, 123) if token not in plain]
    cases: list[tuple[dict[str, Any], dict[str, Any], Callable[[list[int]], bool]]] = [
        ({"logit_bias": {str(first): -100}}, {"logit_bias": {first: -100}}, lambda tokens: first not in tokens),
        ({"allowed_token_ids": others}, {"allowed_token_ids": others}, lambda tokens: {*tokens} <= {*others}),
        ({"repetition_penalty": 50}, {"repetition_penalty": 50}, lambda tokens: len({*tokens}) == len(tokens)),
        (
            {"presence_penalty": 2, "frequency_penalty": 2},
            {"presence_penalty": 2, "frequency_penalty": 2},
            plain.__ne__,
        ),
        ({"stop_token_ids": [third]}, {"stop_token_ids": [third]}, lambda tokens: third not in tokens),
        (
            {"stop_token_ids": [third], "include_stop_str_in_output": True},
            {"stop_token_ids": [third], "include_stop": True},
            lambda tokens: tokens == plain[: plain.index(third) + 1],
        ),
        (
            {"stop_token_ids": [third], "min_tokens": 9},
            {"stop_token_ids": [third], "min_tokens": 9},
            lambda tokens: len(tokens) >= 9,
        ),
    ]
    for over_http, over_grpc, holds in cases:
        tokens = greedy_tokens(client, **over_grpc)
        assert holds(tokens), over_grpc
        extra = {**over_http, "diptych": {"fingerprint": True}}
        choice = api.completions.create(**GREEDY, max_tokens=12, extra_body=extra).choices[0].to_dict()
        assert choice["diptych"]["token_ids"] == tokens, over_http


def test_min_p_of_one_is_greedy(client: Client) -> None:
    drawn = tokens_of(client.generate(PROMPT, max_tokens=12, temperature=2, min_p=1.0, seed=3))
    assert drawn == greedy_tokens(client)


def test_bad_words_do_not_come_about(api: openai.OpenAI) -> None:
    allowed = [ord(letter) for letter in "abc"]
    body = {"allowed_token_ids": allowed, "bad_words": ["ab", "ca"], "ignore_eos": True}
    completion = api.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=100, temperature=2.0, seed=1, extra_body=body
    )
    text = completion.choices[0].text
    assert len(text) == 100
    assert set(itertools.pairwise(text)) >= {("b", "a"), ("b", "c"), ("a", "c")}
    assert "ab" not in text
    assert "ca" not in text


def test_a_request_that_runs_out_of_tokens_is_refused_in_the_middle(client: Client) -> None:
    stuck = client.generate(PROMPT, max_tokens=20, allowed_token_ids=[97], bad_words=["aa"])
    with pytest.raises(InvalidRequest, match="nothing is left to draw"):
        list(stuck)


def test_choices_differ_and_come_again_with_the_seed(api: openai.OpenAI) -> None:
    def texts(seed: int | None) -> list[str]:
        made = api.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, n=5, seed=seed)
        assert [choice.index for choice in made.choices] == list(range(5))
        return [choice.text for choice in made.choices]

    assert len(set(texts(7))) == 5
    assert texts(7) == texts(7)
    assert texts(None) != texts(None)


# ---- stop strings -------------------------------------------------------------------------------------------


def test_an_answer_ends_at_its_stop_string_and_counts_to_it(api: openai.OpenAI) -> None:
    allowed = {"allowed_token_ids": [ord(letter) for letter in "abc"], "diptych": {"fingerprint": True}}
    request: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "seed": 5, "temperature": 2.0}
    whole = api.completions.create(**request, extra_body=allowed).choices[0].text
    assert len(whole) == 64
    places = [at for at in range(64) if whole.startswith("ab", at)]
    assert len(places) > 1
    ends = [
        ({}, places[0], places[0] + 2),
        ({"include_stop_str_in_output": True}, places[0] + 2, places[0] + 2),
        ({"min_tokens": places[0] + 2}, places[0], places[0] + 2),
        ({"min_tokens": places[0] + 3}, places[1], places[1] + 2),
        ({"min_tokens": places[1] + 1, "include_stop_str_in_output": True}, places[1] + 2, places[1] + 2),
    ]
    for more, length, count in ends:
        body = {**allowed, **more}
        made = api.completions.create(**request, stop=["ab"], extra_body=body)
        assert made.choices[0].text == whole[:length]
        assert made.choices[0].finish_reason == "stop"
        assert made.usage is not None
        assert made.usage.completion_tokens == count
        assert len(made.choices[0].to_dict()["diptych"]["token_ids"]) == count
        pieces = list(api.completions.create(**request, stop=["ab"], stream=True, extra_body=body))
        assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole[:length]


# ---- log-probabilities -----------------------------------------------------------------------------------------


def test_chat_log_probabilities_have_openais_shape_whole_and_streamed(api: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    request |= {"seed": 3, "logprobs": True, "top_logprobs": 4}
    choice = api.chat.completions.create(**request).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 9
    for entry in content:
        assert entry.bytes is not None
        assert len(entry.top_logprobs) == 4
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] < 0
        assert sum(map(math.exp, values)) < 1
    pieces = list(api.chat.completions.create(**request, stream=True))
    streamed = [piece.choices[0].logprobs for piece in pieces]
    assert [entry for given in streamed if given for entry in given.content or ()] == content
    request["top_logprobs"] = None
    bare = api.chat.completions.create(**request).choices[0].logprobs
    assert bare is not None
    assert [entry.top_logprobs for entry in bare.content or ()] == [[]] * 9
    plain = api.chat.completions.create(**{**request, "logprobs": False})
    assert plain.choices[0].logprobs is None


def test_completion_log_probabilities_have_openais_shape_whole_and_streamed(api: openai.OpenAI) -> None:
    body = {"allowed_token_ids": [ord(letter) for letter in "abcdef"]}
    request: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "seed": 3, "extra_body": body}
    choice = api.completions.create(**request, logprobs=3).choices[0]
    given = choice.logprobs
    assert given is not None
    assert "".join(given.tokens or ()) == choice.text
    assert given.text_offset == list(range(9))
    assert given.token_logprobs is not None
    assert given.top_logprobs is not None
    for token, logprob, top in zip(given.tokens or (), given.token_logprobs, given.top_logprobs, strict=True):
        assert 3 <= len(top) <= 4
        assert top[token] == logprob
        assert list(top.values()) == sorted(top.values(), reverse=True)
    pieces = list(api.completions.create(**request, logprobs=3, stream=True))
    streamed = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert list(itertools.chain(*(getattr(each, name) for each in streamed))) == getattr(given, name)
    none = api.completions.create(**request, logprobs=0).choices[0].logprobs
    assert none is not None
    assert [list(top) for top in none.top_logprobs or ()] == [[token] for token in given.tokens or ()]


def test_an_echo_says_the_prompt_first_with_its_log_probabilities(api: openai.OpenAI, client: Client) -> None:
    request: dict[str, Any] = {**GREEDY, "max_tokens": 5, "extra_body": {"allowed_token_ids": [97, 98, 99]}}
    answer = api.completions.create(**request, logprobs=2).choices[0]
    echoed = api.completions.create(**request, logprobs=2, echo=True).choices[0]
    assert echoed.text == PROMPT + answer.text
    given, before = echoed.logprobs, len(PROMPT)
    assert given is not None
    assert given.tokens == list(echoed.text)
    assert given.text_offset == list(range(len(echoed.text)))
    assert answer.logprobs is not None
    assert (given.token_logprobs or [])[before:] == answer.logprobs.token_logprobs
    told = [
        each
        for response in client.generate(PROMPT, max_tokens=1, prompt_logprobs=2)
        for each in response.chunk.prompt_logprobs
    ]
    assert (given.token_logprobs or [])[0] is None
    assert (given.token_logprobs or [])[1:before] == pytest.approx([each.logprob for each in told])
    [streamed] = ["".join(piece.choices[0].text for piece in api.completions.create(**request, echo=True, stream=True))]
    assert streamed == echoed.text


def test_prompt_log_probabilities_have_vllms_shape(stack: Any, client: Client) -> None:
    body = {"model": "tiny", "max_tokens": 2, "prompt_logprobs": 2, "temperature": 0}
    text = httpx.post(f"{stack.url}/v1/completions", json={**body, "prompt": "né"}).json()
    first, *rest = text["choices"][0]["prompt_logprobs"]
    assert first is None
    told = [
        each
        for response in client.generate("né", max_tokens=1, prompt_logprobs=2)
        for each in response.chunk.prompt_logprobs
    ]
    for position, token, each in zip(rest, "né".encode()[1:], told, strict=True):
        assert position[str(token)]["logprob"] == pytest.approx(each.logprob)
        assert position[str(token)]["rank"] == each.rank
        ranked = sorted(position.values(), key=lambda entry: entry["rank"])
        assert [entry["rank"] for entry in ranked][:2] == [1, 2]
    assert rest[0]["195"]["decoded_token"] == "bytes:\\xc3"
    messages = [{"role": "user", "content": "hi"}]
    chat = httpx.post(f"{stack.url}/v1/chat/completions", json={**body, "messages": messages, "n": 2}).json()
    assert len(chat["prompt_logprobs"]) == len(client.tokenize(messages=messages))
    assert chat["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_grpc_log_probabilities_come_with_their_tokens(client: Client) -> None:
    *chunks, last = client.generate(PROMPT, max_tokens=6, seed=1, logprobs=3, prompt_logprobs=0)
    prompt = [each for response in chunks for each in response.chunk.prompt_logprobs]
    assert len(prompt) == len(PROMPT) - 1
    assert all(not each.top_token_ids for each in prompt)
    assert not chunks[0].chunk.token_ids
    given = [each for response in chunks for each in response.chunk.logprobs]
    tokens = [token for response in chunks for token in response.chunk.token_ids]
    assert len(given) == len(tokens) == last.complete.usage.completion_tokens
    for each, token in zip(given, tokens, strict=True):
        assert len(each.top_token_ids) == len(each.top_logprobs) == 3
        if each.rank <= 3:
            assert each.top_token_ids[each.rank - 1] == token
