"""Text in every script through the whole front: no piece holds half a character, and all make up the whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.front.tokenizer import TextModel
from diptych import Client
from diptych.types import (
    Emission,
    FrontId,
    KvLayout,
    ModelSource,
    Outgoing,
    Placement,
    Request,
    RequestId,
    Served,
    TokenLogprobs,
    WorkerId,
    WorkerInfo,
)

TEXTS = {
    "joined emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👋🏽 1️⃣ 🇨🇭",
    "chinese and japanese": "日本語の漢字と、简体中文。",
    "arabic": "مرحبا بالعالم، كيف الحال؟",
    "combining marks": "ne\u0301e हिन्दी",  # codespell:ignore
    "far planes": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🜁",
}
INVALID = {
    "lone continuation": b"a\x80b",
    "cut short": b"a\xf0\x9f\x91",
    "overlong": b"\xc0\xaf!",
    "surrogate": b"\xed\xa0\x80x",
    "a cut one, then a whole one": b"\xe6\x97\xf0\x9f\x91\x8b",
}


@dataclass
class ScriptedPort:
    """A worker that answers with the tokens it was given, one an item, and scores them."""

    tokens: list[int] = field(default_factory=list)
    items: asyncio.Queue[Emission | None] = field(default_factory=asyncio.Queue)

    async def submit(self, request: Request, attempt: int, placement: Placement) -> None:
        served = Served(how="mixed", prefill_worker="w", decode_worker="w", prompt_tokens_computed=1, cached_tokens=0)
        scores = TokenLogprobs(-1.0, 1) if request.params.logprobs is not None else None
        for index, token in enumerate(self.tokens):
            finish = "length" if index == len(self.tokens) - 1 else None
            said = Emission(request.id, attempt, request.choice, index, token, finish, served, logprobs=scores)
            self.items.put_nowait(said)

    async def cancel(self, request: RequestId, attempt: int) -> None: ...

    async def owns(self, request: RequestId, attempt: int) -> bool:
        return True

    async def outbox(self, front: FrontId) -> AsyncGenerator[tuple[Outgoing, ...], None]:
        yield ()
        while item := await self.items.get():
            yield (item,)

    async def stop(self) -> None:
        self.items.put_nowait(None)


@dataclass(frozen=True)
class Said:
    """A tokenizer, a worker that says what it is told to, and the front over both."""

    text: TextModel
    port: ScriptedPort
    stack: Any


def source(kind: str, request: pytest.FixtureRequest) -> ModelSource:
    if kind == "byte-level":
        return request.getfixturevalue("default_model")
    if kind == "sentence pieces":
        path: Path = request.getfixturevalue("sentence_piece_gguf")
        return ModelSource(name="pieces", path=str(path), digest="")
    return ModelSource(name="tiny", path="random:tiny", digest="")


@pytest.fixture(scope="module", params=["byte-level", "sentence pieces", "plain bytes"])
def said(request: pytest.FixtureRequest, front_over: Callable[..., Any]) -> Iterator[Said]:
    text = TextModel.load(source(request.param, request))
    layout = KvLayout(layers=1, kv_heads=1, block_size=16, head_dim=8, dtype="fp32")
    info = WorkerInfo(
        id=WorkerId("w"),
        role="mixed",
        epoch=0,
        build="b",
        model_digest="",
        layout=layout,
        blocks=64,
        max_context=512,
        device="cpu",
        host="here",
        pid=1,
        threads=1,
    )
    ports: list[ScriptedPort] = []

    async def start() -> tuple[WorkerInfo, ScriptedPort]:
        ports.append(ScriptedPort())
        return info, ports[0]

    with front_over(text, start) as stack:
        yield Said(text, ports[0], stack)


def bytes_to_tokens(text: TextModel, data: bytes) -> list[int]:
    """One token for each byte, the way a model emits what it has no word for."""
    by_bytes = {text.written(token): token for token in range(min(text.vocab_size, 49_152) - 1, -1, -1)}
    # The default model has no token for some bytes that no text has.
    return [by_bytes[data[at : at + 1]] for at in range(len(data)) if data[at : at + 1] in by_bytes]


def pieces_and_whole(said: Said, tokens: list[int]) -> tuple[list[str], str]:
    """The text as it streams over HTTP and gRPC, and not streamed: all must agree."""
    said.port.tokens = tokens
    url, body = f"{said.stack.url}/v1/completions", {"model": "tiny", "prompt": "a"}
    lines = httpx.post(url, json={**body, "stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    over_http = [choice["text"] for event in events for choice in event["choices"]]
    whole = httpx.post(url, json=body).json()["choices"][0]["text"]
    with Client(said.stack.target) as client:
        over_grpc = [response.chunk.text for response in client.generate("a")]
    assert "".join(over_grpc) == "".join(over_http) == whole
    return over_http, whole


@pytest.mark.parametrize("sample", TEXTS.values(), ids=TEXTS.keys())
def test_every_piece_is_whole_characters(said: Said, sample: str) -> None:
    for tokens in (said.text.spell(sample), bytes_to_tokens(said.text, sample.encode())):
        if said.text.decode(tokens) != sample:  # a few characters are beyond the default model
            continue
        pieces, whole = pieces_and_whole(said, tokens)
        assert whole.removeprefix(" ") == sample
        assert not any("\ufffd" in piece for piece in pieces)
    assert said.text.decode(said.text.spell(sample)) == sample


@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID.keys())
def test_bytes_that_are_no_text_read_the_same_streamed_and_whole(said: Said, data: bytes) -> None:
    tokens = bytes_to_tokens(said.text, data)
    _, whole = pieces_and_whole(said, tokens)
    spelled = b"".join(said.text.written(token) for token in tokens)
    assert whole == spelled.decode(errors="replace")
    assert "\ufffd" in whole


def test_a_stop_string_is_found_across_the_bytes_of_its_characters(said: Said) -> None:
    said.port.tokens = bytes_to_tokens(said.text, "日本👋語".encode())
    with openai.OpenAI(base_url=f"{said.stack.url}/v1", api_key="none", max_retries=0) as api:
        made = api.completions.create(model="tiny", prompt="a", stop="👋")
    assert made.choices[0].text == "日本"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage is not None
    assert made.usage.completion_tokens == len("日本👋".encode())


def test_log_probabilities_give_the_bytes_of_every_token(said: Said) -> None:
    sample = "👩‍👧 né"
    said.port.tokens = bytes_to_tokens(said.text, sample.encode())
    with openai.OpenAI(base_url=f"{said.stack.url}/v1", api_key="none", max_retries=0) as api:
        text = api.completions.create(model="tiny", prompt="a", logprobs=0).choices[0]
    assert text.logprobs is not None
    assert text.text == sample
    # Each byte of a character is where the character is.
    offsets = [at for at, character in enumerate(sample) for _ in character.encode()]
    assert text.logprobs.text_offset == offsets
    assert (text.logprobs.tokens or [])[0] == "bytes:\\xf0"
