"""What answers are compared with: twenty prompts, and workers held in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest

from cluster.cache import cache_folder
from cluster.front.chat import ChatMessage
from cluster.front.tokenizer import TextModel
from diptych.hashing import KvIdentity, granule_hashes
from diptych.types import (
    Emission,
    FrontId,
    ModelDtype,
    ModelSource,
    Placement,
    Request,
    RequestId,
    Role,
    SamplingParams,
    Served,
    WorkerId,
    WorkerSpec,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from workers.worker import Worker

ANSWER_TOKENS = 64
WireOption = Literal["native", "int8", "fp8_e4m3"]
KvOption = Literal["auto", "fp8"]
WAIT_SECONDS = 120
ME, FRONT = WorkerId("lone-0"), FrontId("test")
ROOT = KvIdentity(model_digest="any", weight_format="any", kv_dtype="any").root()

TEXTS = (
    "The",
    "Once upon a time",
    "The capital of Sweden is",
    "2 + 2 = 4, 3 + 3 = 6, 4 + 4 =",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "SELECT name, age FROM people WHERE",
    '{"name": "Ada", "born": 1815, "works": [',
    "# Recipe: pancakes\n\n## Ingredients\n\n- 2 eggs\n",
    "Die Würde des Menschen ist",
    "Il était une fois une petite fille qui",
    "日本の首都は",
    "😀 😃 😄 means that",
    "A, B, C, D, E, F, G, H, I, J, K, L, M, N,",
    "It was the best of times, it was the worst of times, it was the age of wisdom,",
    "<html>\n  <head>\n    <title>My page</title>\n  </head>\n  <body>\n",
    "Q: Why is the sky blue?\nA:",
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 4,
    " ".join(str(number * number) for number in range(60)),
)
CHATS = (
    [{"role": "user", "content": "Explain how a bicycle stays upright."}],
    [
        {"role": "system", "content": "You are a pirate. Answer in one sentence, always as a pirate would."},
        {"role": "user", "content": "What did you have for breakfast, and was it worth the trouble of cooking it?"},
    ],
)


@pytest.fixture(scope="session")
def prompts(default_model: ModelSource) -> list[tuple[int, ...]]:
    """Twenty, of 1 to some 300 tokens: prose, code, numbers, other scripts, conversations."""
    text = TextModel.load(default_model)
    plain = [tuple(text.encode(one)) for one in TEXTS]
    return plain + [tuple(text.encode_chat([ChatMessage(**turn) for turn in chat])) for chat in CHATS]


@dataclass(frozen=True)
class Said:
    """One answer, token by token."""

    tokens: tuple[int, ...]
    fingerprints: tuple[bytes | None, ...]
    argmax: tuple[int | None, ...]
    logprobs: tuple[float | None, ...]
    served: Served | None


class Lone:
    """One worker in this process, that computes prompts itself: what a hand-off is compared with."""

    def __init__(
        self,
        worker: Worker,
        run: Callable[[Coroutine[Any, Any, list[Said]]], list[Said]],
        placement: Placement | None = None,
    ) -> None:
        self._worker = worker
        self._run = run
        self._placement = placement or Placement(decode=ME, prefill=None, how="local", reason="nobody else is here")
        self._count = 0

    def answers(
        self, prompts: Sequence[Sequence[int]], tokens: int, forced: Sequence[Sequence[int]] = ()
    ) -> list[Said]:
        """Greedy answers to all of them at the same time."""
        given = forced or [()] * len(prompts)
        return self._run(self._all([self._request(*each, tokens) for each in zip(prompts, given, strict=True)]))

    def _request(self, prompt: Sequence[int], forced: Sequence[int], tokens: int) -> Request:
        self._count += 1
        params = SamplingParams(max_tokens=tokens, temperature=0, fingerprint=True, forced=tuple(forced), logprobs=0)
        return Request(
            id=RequestId(f"r{self._count}"),
            front=FRONT,
            tokens=tuple(prompt),
            granules=granule_hashes(prompt, ROOT),
            root=ROOT,
            params=params,
        )

    async def _all(self, requests: list[Request]) -> list[Said]:
        heard: dict[RequestId, list[Emission]] = {request.id: [] for request in requests}
        missing = set(heard)
        async with asyncio.timeout(WAIT_SECONDS), aclosing(self._worker.outbox(FRONT)) as outbox:
            await anext(outbox)  # open
            for request in requests:
                await self._worker.submit(request, 0, self._placement)
            while missing:
                for item in await anext(outbox):
                    assert isinstance(item, Emission), item
                    heard[item.request].append(item)
                    missing -= {item.request} if item.finish else set()
        return [said(heard[request.id]) for request in requests]


def said(emissions: Sequence[Emission]) -> Said:
    assert [each.index for each in emissions] == list(range(len(emissions)))
    return Said(
        tokens=tuple(each.token for each in emissions),
        fingerprints=tuple(each.fingerprint for each in emissions),
        argmax=tuple(each.argmax for each in emissions),
        logprobs=tuple(each.logprobs.logprob if each.logprobs else None for each in emissions),
        served=emissions[-1].served,
    )


def spec_of(model: ModelSource, dtype: ModelDtype) -> WorkerSpec:
    """A worker of the same making as a cluster's, with default settings and one thread."""
    return WorkerSpec(
        id=ME,
        role="mixed",
        epoch=0,
        model=model,
        dtype=dtype,
        block_size=16,
        memory_bytes=256 << 20,
        max_batch_tokens=512,
        max_running=64,
        threads=1,
        device="cpu",
        host="127.0.0.1",
        link="gloo",
        wire="native",
        verify="all",
        secret=b"secret",
        lease_seconds=10,
        cache=str(cache_folder() / "weights"),
    )


@contextmanager
def held(model: ModelSource, dtype: ModelDtype, kv: KvOption = "auto") -> Iterator[Lone]:
    """One worker."""
    from workers.worker import Worker

    async def made() -> Worker:
        worker = Worker(replace(spec_of(model, dtype), kv=kv))
        await worker.start()
        return worker

    with asyncio.Runner() as runner:
        worker = runner.run(made())
        yield Lone(worker, runner.run)
        assert runner.run(worker.stop())


@contextmanager
def held_apart(model: ModelSource, dtype: ModelDtype, wire: WireOption, kv: KvOption = "auto") -> Iterator[Lone]:
    """Two workers, and every prompt handed over between them by gloo. First tokens come from prefill."""
    from workers.worker import Worker

    def made(worker: str, role: Role) -> Worker:
        return Worker(replace(spec_of(model, dtype), id=WorkerId(worker), role=role, wire=wire, kv=kv))

    async def started() -> tuple[Worker, Worker, asyncio.Task[None]]:
        prefill, decode = made("prefill-0", "prefill"), made("decode-0", "decode")
        for worker in (prefill, decode):
            await worker.start()
        await prefill.meet({WorkerId("decode-0"): decode})
        await decode.meet({WorkerId("prefill-0"): prefill})
        return prefill, decode, asyncio.ensure_future(drained(prefill))

    async def drained(worker: Worker) -> None:
        """Decode says the first tokens again."""
        async for _ in worker.outbox(FRONT):
            pass

    async def ended(prefill: Worker, decode: Worker) -> bool:
        return all(await asyncio.gather(prefill.stop(), decode.stop()))

    placement = Placement(decode=WorkerId("decode-0"), prefill=WorkerId("prefill-0"), how="remote", reason="a test")
    with asyncio.Runner() as runner:
        prefill, decode, _ = runner.run(started())
        yield Lone(decode, runner.run, placement)
        assert runner.run(ended(prefill, decode))


class Hold(Protocol):
    """The fixture `hold`."""

    def __call__(
        self, model: ModelSource, dtype: ModelDtype, kv: KvOption = "auto"
    ) -> AbstractContextManager[Lone]: ...


@pytest.fixture(scope="session")
def hold() -> Hold:
    """`with hold(model, dtype, kv) as lone:` a worker in this process."""
    return held


@pytest.fixture(scope="session")
def hold_apart() -> Callable[..., AbstractContextManager[Lone]]:
    """`with hold_apart(model, dtype, wire, kv) as pair:` two workers in this process."""
    return held_apart


@pytest.fixture(scope="session")
def fp32(default_model: ModelSource) -> Iterator[Lone]:
    """The exact one."""
    with held(default_model, "fp32") as lone:
        yield lone


@pytest.fixture(scope="session")
def reference(fp32: Lone, prompts: list[tuple[int, ...]]) -> list[Said]:
    """Sixty-four tokens to each prompt, fp32, computed in one place in one batch."""
    return fp32.answers(prompts, ANSWER_TOKENS)
