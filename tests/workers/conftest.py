"""Engines alone, and a prefill and a decode worker in this process with real gloo between them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import pytest
import torch

from diptych.errors import ServingError
from diptych.hashing import KvIdentity, granule_hashes
from diptych.types import (
    Emission,
    Failure,
    FrontId,
    ModelSource,
    Placement,
    Report,
    Request,
    RequestId,
    SamplingParams,
    Served,
    WorkerId,
    WorkerSpec,
)
from workers.engine.engine import Engine, EngineLimits
from workers.engine.model import Model
from workers.engine.sequence import Sequence
from workers.engine.weights import Weights, load_weights
from workers.engine_thread import Roles
from workers.transfer.acquaintance import Neighbours
from workers.worker import Worker

T = TypeVar("T")
TINY = ModelSource(name="tiny", path="random:tiny", digest="abcdef0123456789")
ROOT = KvIdentity(model_digest=TINY.digest, weight_format="fp32", kv_dtype="fp32").root()
TEST_SECONDS = 30.0
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Engines share two cores with everything else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- requests --------------------------------------------------------------------------------------------


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(300), k=length))


def request_of(tokens: tuple[int, ...], max_tokens: int = 12, **params: Any) -> Request:
    """Greedy, with fingerprints, unless `params` says otherwise."""
    values = {"temperature": 0.0, "seed": 5, "fingerprint": True, **params}
    return Request(
        id=RequestId(f"r{next(_numbers)}"),
        front=FrontId("front"),
        tokens=tokens,
        granules=granule_hashes(tokens, ROOT),
        root=ROOT,
        params=SamplingParams(max_tokens=max_tokens, **values),
    )


@pytest.fixture
def prompt() -> Callable[..., tuple[int, ...]]:
    """(length, seed) → tokens."""
    return prompt_of


@pytest.fixture
def request_for() -> Callable[..., Request]:
    """(tokens, max_tokens, **sampling) → a request with an id of its own."""
    return request_of


# ---- an engine -------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """What must not depend on how it came about: the token and the bits of its logits."""

    token: int
    fingerprint: bytes | None


@pytest.fixture(scope="session")
def weights() -> Weights:
    return load_weights(TINY, "fp32", cache=None)


class Bench(Engine):
    """An engine that runs sequences to their end."""

    def sequence(self, request: Request, arrival: int | None = None) -> Sequence:
        return Sequence(
            request=request,
            attempt=0,
            task="answer",
            arrival=next(_numbers) if arrival is None else arrival,
            block_size=self.limits.block_size,
        )

    def answers(self, *requests: Request, each_steps: int = 0) -> list[list[Token]]:
        """Everyone's tokens. With `each_steps`, so many steps pass between two arrivals."""
        arriving = [self.sequence(request) for request in requests]
        said: dict[Sequence, list[Token]] = {sequence: [] for sequence in arriving}
        for step in itertools.count():
            while arriving and (not each_steps or step % each_steps == 0):
                self.add(arriving.pop(0))
                if each_steps:
                    break
            if not arriving and not self.has_work:
                return list(said.values())
            result = self.step()
            assert not result.failed
            for sampled in result.sampled:
                said[sampled.sequence].append(Token(sampled.token, sampled.fingerprint))
                if sampled.finish:
                    self.drop(sampled.sequence)
            if step % 8 == 0:  # it looks at every block
                self.pool.check()
        raise AssertionError


@pytest.fixture
def bench(weights: Weights) -> Callable[..., Bench]:
    """(**limits) → an engine on the tiny model."""

    def make(dtype: str = "fp32", model: Model | None = None, **limits: int) -> Bench:
        values = {"block_size": 16, "blocks": 512, "max_batch_tokens": 512, "max_running": 64, "max_context": 8192}
        device = torch.device("cpu")
        model = model or Model(weights, max_context=8192, device=device)
        return Bench(model, EngineLimits(**{**values, **limits}), dtype=dtype, device=device)

    return make


# ---- two workers -----------------------------------------------------------------------------------------

Fault = Callable[..., Awaitable[None]]


@dataclass(eq=False)
class Wire:
    """A peer whose calls a test can hold, lose or fail, before they arrive or when they are answered."""

    worker: Worker
    before: dict[str, Fault] = field(default_factory=dict)
    after: dict[str, Fault] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self.worker, name)

        async def call(*arguments: object) -> object:
            self.calls[name] += 1
            if fault := self.before.get(name):
                await fault(*arguments)
            answer = await method(*arguments)
            if fault := self.after.get(name):
                await fault(*arguments)
            return answer

        return call


async def lost(*_: object) -> None:
    """Nothing arrives and nobody says so."""
    await asyncio.Event().wait()


@dataclass(eq=False)
class Front:
    """Reads outboxes, as a dispatcher does: by attempt and index, once."""

    said: dict[RequestId, dict[int, Emission]] = field(default_factory=dict)
    failures: dict[RequestId, ServingError] = field(default_factory=dict)
    contradictions: list[tuple[Emission, Emission]] = field(default_factory=list)
    heard: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def read(self, worker: Worker, name: str) -> None:
        async for items in worker.outbox(FrontId(name)):
            for item in items:
                self._hear(item)
            async with self.heard:
                self.heard.notify_all()

    def _hear(self, item: Emission | Failure) -> None:
        if isinstance(item, Failure):
            self.failures[item.request] = item.error
            return
        known = self.said.setdefault(item.request, {}).setdefault(item.index, item)
        if known[:6] != item[:6] or known.fingerprint != item.fingerprint:
            self.contradictions.append((known, item))

    def count(self, request: RequestId) -> int:
        return len(self.said.get(request, {}))

    def is_over(self, request: RequestId) -> bool:
        said = self.said.get(request, {})
        ends = [index for index, emission in said.items() if emission.finish]
        return request in self.failures or bool(ends and len(said) == ends[0] + 1)

    async def wait_for(self, is_so: Callable[[], bool]) -> None:
        async with self.heard:
            await asyncio.wait_for(self.heard.wait_for(is_so), TEST_SECONDS)

    def answer(self, request: RequestId) -> list[Token]:
        said = self.said[request]
        return [Token(said[index].token, said[index].fingerprint) for index in range(len(said))]

    def served(self, request: RequestId) -> Served:
        said = self.said[request]
        served = said[len(said) - 1].served
        assert served is not None
        return served


class Pair:
    """p and d, who know each other through `to_p` (d's calls) and `to_d` (p's calls)."""

    def __init__(self, prefill: WorkerSpec, decode: WorkerSpec) -> None:
        self.neighbours = neighbours = Neighbours()
        self.p, self.d = Worker(prefill, neighbours), Worker(decode, neighbours)
        self.to_p, self.to_d = Wire(self.p), Wire(self.d)
        self.front = Front()
        self.read: Callable[[Worker], None] = lambda _: None
        self.reports: dict[WorkerId, Report] = {}
        self.remote = Placement(decode=decode.id, prefill=prefill.id, how="remote", reason="")
        self.local = Placement(decode=decode.id, prefill=None, how="local", reason="")

    async def submit(self, request: Request, placement: Placement | None = None) -> RequestId:
        await self.d.submit(request, 0, placement or self.remote)
        return request.id

    async def answers(self, *requests: Request, placement: Placement | None = None) -> list[list[Token]]:
        for request in requests:
            await self.submit(request, placement)
        await self.front.wait_for(lambda: all(self.front.is_over(request.id) for request in requests))
        assert not self.front.failures
        return [self.front.answer(request.id) for request in requests]

    async def replace_prefill(self) -> None:
        """By its next incarnation. d meets it at once: nobody told that the one before left."""
        await self.settle()
        before, spec = self.p, self.p.spec
        self.p = Worker(replace(spec, epoch=spec.epoch + 1), self.neighbours)
        self.to_p = Wire(self.p)
        await self.p.start()
        self.read(self.p)
        await self.p.meet({self.d.spec.id: self.to_d})
        await self.d.meet({spec.id: self.to_p})
        assert await before.stop()

    async def see(self, worker: Worker, what: Callable[[Roles], T]) -> T:
        """What a worker's engine thread sees between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def look() -> None:
            loop.call_soon_threadsafe(future.set_result, what(worker._roles))

        worker._engine.post(look)
        return await asyncio.wait_for(future, TEST_SECONDS)

    async def until(self, worker: Worker, is_so: Callable[[Roles], bool]) -> None:
        async with asyncio.timeout(TEST_SECONDS):
            while not await self.see(worker, is_so):  # noqa: ASYNC110 (an engine thread sets no event)
                await asyncio.sleep(0.002)

    async def settle(self) -> None:
        """Until nothing is under way on either side; then every block must be free or cached."""
        for worker in (self.p, self.d):
            await self.until(worker, _idle)
            await self.see(worker, _check_whole)

    async def counters(self, worker: Worker) -> Any:
        """As the next full report tells them."""
        return await self.see(worker, lambda roles: worker._engine._counters(roles, audit=True))

    async def transitions(self, worker: Worker) -> dict[tuple[str, str], int]:
        """Of its hand-offs."""
        role = "prefill" if worker is self.p else "decode"

        def read(roles: Roles) -> dict[tuple[str, str], int]:
            tally = getattr(roles, role).counters.tally
            return {(before.value, after.value): count for (before, after), count in tally.transitions.items()}

        return await self.see(worker, read)


def _idle(roles: Roles) -> bool:
    return not (roles.decode._answers or roles.prefill._jobs or roles.engine.pool.owners() or roles.engine.has_work)


def _check_whole(roles: Roles) -> None:
    pool = roles.engine.pool
    pool.check()
    assert (pool.held, pool.granted, pool.lent) == (0, 0, 0)
    assert pool.free + pool.cached == roles.engine.limits.blocks
    assert not roles.decode._by_sequence
    assert not roles.receiver._inbound
    assert not roles.sender._outbound
    assert not roles.prefill._by_sequence
    assert not roles.engine.batcher.granted


@pytest.fixture
def spec() -> WorkerSpec:
    """A worker's; `dataclasses.replace` makes others of it."""
    return WorkerSpec(
        id=WorkerId("d"),
        role="decode",
        epoch=0,
        model=TINY,
        dtype="fp32",
        block_size=16,
        memory_bytes=512 * 8192,
        max_batch_tokens=256,
        max_running=16,
        threads=1,
        device="cpu",
        host="127.0.0.1",
        link="gloo",
        wire="native",
        verify="all",
        secret=b"s" * 16,
        lease_seconds=10.0,
        cache="",
    )


@pytest.fixture
def pair(spec: WorkerSpec) -> Callable[..., Any]:
    """(prefill={…}, decode={…}, **both) → an async context with a `Pair`; at its end both must be whole.

    Over links that read, both are of one process only if `link` is loopback.
    """

    @asynccontextmanager
    async def make(
        prefill: Mapping[str, Any] | None = None, decode: Mapping[str, Any] | None = None, **both: Any
    ) -> AsyncIterator[Pair]:
        p_spec = replace(spec, **{"id": WorkerId("p"), "role": "prefill", **both, **(prefill or {})})
        pair = Pair(p_spec, replace(spec, **{**both, **(decode or {})}))
        await asyncio.gather(pair.p.start(), pair.d.start())
        await pair.p.meet({pair.d.spec.id: pair.to_d})
        await pair.d.meet({pair.p.spec.id: pair.to_p})
        readers = [asyncio.ensure_future(pair.front.read(worker, "front")) for worker in (pair.p, pair.d)]
        pair.read = lambda worker: readers.append(asyncio.ensure_future(pair.front.read(worker, "front")))
        await asyncio.sleep(0)  # both read from here on
        try:
            yield pair
            await pair.settle()
            for worker in (pair.p, pair.d):
                assert (await pair.counters(worker)).leaked_blocks == 0
            assert not pair.front.contradictions
        finally:
            stopped = await asyncio.gather(pair.p.stop(), pair.d.stop())
            await asyncio.gather(*readers)
        assert all(stopped)

    return make


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Runs a test's coroutine; none takes longer than `TEST_SECONDS`."""

    def runs(work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(work, TEST_SECONDS)

        return asyncio.run(bounded())

    return runs
