"""The real HTTP and gRPC servers over a scripted service: everything of the front but the cluster behind it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from hashlib import sha256
from queue import Queue
from typing import TYPE_CHECKING, TypeVar

import pytest

from cluster.front.grpc_service import serve_grpc
from cluster.front.http import serve_http
from cluster.front.service import Ask, Delta, Usage
from cluster.front.tokenizer import TextModel
from cluster.observe.metrics import FrontMetrics
from diptych import Client
from diptych.errors import UnknownRequest
from diptych.types import (
    ClusterStatus,
    Counters,
    Explanation,
    KvLayout,
    Load,
    ModelSource,
    RequestId,
    Served,
    TokenLogprobs,
    WorkerId,
    WorkerInfo,
    WorkerStatus,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Iterator

T = TypeVar("T")
WAIT_SECONDS = 20


@dataclass
class ScriptedService:
    """Says what the test tells it to; counts what was asked and closed."""

    text: TextModel
    model_name: str = "tiny"
    max_context: int = 512
    ready: bool = True
    answer: str = "Grüß Gott"
    widen: int = 1
    """Each token says its character so many times."""
    fail_at: int | None = None
    """Raises `error` instead of the answer's character at this place."""
    error: Exception | None = None
    hold_at: int | None = None
    """Waits at this place until it is cancelled."""
    asks: list[Ask] = field(default_factory=list)
    closed: Queue[RequestId] = field(default_factory=Queue)
    """The requests whose generators have ended, however."""
    held: Queue[RequestId] = field(default_factory=Queue)
    away: tuple[tuple[WorkerId, str], ...] = ()
    explanations: dict[str, tuple[Explanation, ...]] = field(default_factory=dict)

    async def generate(self, ask: Ask) -> AsyncGenerator[Delta, None]:
        self.asks.append(ask)
        completion_tokens = 0
        try:
            for place, character in enumerate(self.answer):
                tokens = tuple(self.text.encode(character))
                if completion_tokens + len(tokens) > ask.params.max_tokens:
                    break
                await self._mishap(ask, place)
                completion_tokens += len(tokens)
                yield Delta(
                    character * self.widen,
                    tokens,
                    _fingerprints(ask, tokens),
                    ask.params.forced[place : place + 1],
                    logprobs=_logprobs(tokens, ask.params.logprobs),
                    prompt_logprobs=None if place else _prompt_logprobs(ask),
                )
            finish = "stop" if completion_tokens == len(self.text.encode(self.answer)) else "length"
            yield Delta("", (), finish=finish, usage=self._usage(ask, completion_tokens))
        finally:
            self.closed.put(ask.id)

    async def _mishap(self, ask: Ask, place: int) -> None:
        if place == self.fail_at and self.error is not None:
            raise self.error
        if place == self.hold_at:
            self.held.put(ask.id)
            await asyncio.wait_for(asyncio.Event().wait(), WAIT_SECONDS)

    def _usage(self, ask: Ask, completion_tokens: int) -> Usage:
        served = Served(
            how="remote",
            prefill_worker="prefill-0",
            decode_worker="decode-0",
            prompt_tokens_computed=max(0, len(ask.tokens) - 3),
            cached_tokens=min(3, len(ask.tokens)),
            kv_blocks_sent=2,
            kv_bytes_sent=2048,
        )
        return Usage(prompt_tokens=len(ask.tokens), completion_tokens=completion_tokens, served=served)

    async def status(self) -> ClusterStatus:
        workers = (_worker("prefill", leaked_blocks=0), _worker("decode", leaked_blocks=7))
        return ClusterStatus(
            model="tiny", build="b1", workers=workers, requests_placed=5, index_blocks=11, away=self.away
        )

    async def explain(self, request: str) -> tuple[Explanation, ...]:
        if request not in self.explanations:
            raise UnknownRequest(f"no record of {request!r}: the last 4,096 requests are kept")
        return self.explanations[request]


def _fingerprints(ask: Ask, tokens: tuple[int, ...]) -> tuple[bytes, ...]:
    return tuple(sha256(bytes([token])).digest() for token in tokens) if ask.params.fingerprint else ()


def _logprobs(tokens: tuple[int, ...], count: int | None) -> tuple[TokenLogprobs, ...]:
    """Every token is the likeliest, and the lowest ids come after it."""
    if count is None:
        return ()
    top = [tuple(dict.fromkeys((token, *range(20))))[:count] for token in tokens]
    return tuple(TokenLogprobs(-0.5, 1, each, tuple(-0.5 - rank for rank in range(count))) for each in top)


def _prompt_logprobs(ask: Ask) -> tuple[TokenLogprobs, ...] | None:
    count = ask.params.prompt_logprobs
    return None if count is None else _logprobs(ask.tokens[1:], count)


def _worker(role: str, *, leaked_blocks: int) -> WorkerStatus:
    layout = KvLayout(layers=2, kv_heads=1, block_size=16, head_dim=8, dtype="fp32")
    info = WorkerInfo(
        id=WorkerId(f"{role}-0"),
        role=role,
        epoch=3,
        build="b1",
        model_digest="d",
        layout=layout,
        blocks=100,
        max_context=512,
        device="cpu",
        host="here",
        pid=42,
        threads=1,
    )
    load = Load(waiting_requests=1, running_requests=2, blocks_free=60, blocks_cached=10, blocks_held=25, blocks_lent=5)
    counters = Counters(
        decode_steps=4,
        decode_rows=10,
        prompt_tokens_computed=75,
        prompt_tokens_cached=25,
        bytes_sent=4096,
        leaked_blocks=leaked_blocks,
    )
    return WorkerStatus(info=info, load=load, counters=counters, alive=True, report_age_seconds=0.5)


@dataclass(frozen=True)
class Wire:
    """The running servers."""

    service: ScriptedService
    loop: asyncio.AbstractEventLoop
    http_port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Runs in the servers' event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_SECONDS)


@pytest.fixture(scope="session")
def byte_text() -> TextModel:
    """A real tokenizer: one token per byte, and ChatML."""
    return TextModel.load(ModelSource(name="tiny", path="random:tiny", digest="0" * 64))


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, so that tests can use blocking clients."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_SECONDS)
    loop.close()


@pytest.fixture(scope="session")
def _servers(loop: asyncio.AbstractEventLoop, byte_text: TextModel) -> Iterator[Wire]:
    service = ScriptedService(byte_text)
    metrics = FrontMetrics(service.model_name)

    def run(work: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(WAIT_SECONDS)

    observed = metrics.observed(service)
    http = run(serve_http(observed, "127.0.0.1:0", metrics))
    grpc, grpc_port = run(serve_grpc(observed, "127.0.0.1:0"))
    yield Wire(service, loop, http.port, grpc_port)
    run(http.stop())
    run(grpc.stop(1))


@pytest.fixture
def wire(_servers: Wire, byte_text: TextModel) -> Iterator[Wire]:
    """Both servers, over a service with a fresh script."""
    vars(_servers.service).update(vars(ScriptedService(byte_text)))
    yield _servers
    # No test may leave a generator open.
    for _ in _servers.service.asks:
        _servers.service.closed.get(timeout=WAIT_SECONDS)


@pytest.fixture
def service(wire: Wire) -> ScriptedService:
    """What the servers stand on; set its fields to script it."""
    return wire.service


@pytest.fixture
def client(wire: Wire) -> Iterator[Client]:
    """Our own client."""
    with Client(wire.target) as client:
        yield client
