"""A SentencePiece-like model small enough to build for each session, and a front over one worker of a test's."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import pytest

from cluster.front.dispatcher import Dispatcher, FrontIdentity
from cluster.front.grpc_service import serve_grpc
from cluster.front.http import serve_http
from cluster.front.tokenizer import TextModel
from cluster.observe.metrics import FrontMetrics
from diptych.hashing import KvIdentity
from diptych.types import ClusterStatus, FrontId, Placement, WorkerInfo

T = TypeVar("T")
WAIT_SECONDS = 30

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
CONTROL = ("<s>", "</s>")
MERGED = (
    "▁t",
    "he",
    "▁the",
    "in",
    "ing",
    "▁a",
    "an",
    "▁an",
    "and",
    "▁and",
    "th",
    "the",
    "ss",
    "</",
    "s>",
    "▁▁",
    "er",
    "re",
    "ere",
)


def words() -> list[tuple[str, float, int]]:
    """(text, score, kind): kinds are 1 ordinary, 2 unknown, 3 control, 6 byte."""
    table: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), *((text, 0.0, 3) for text in CONTROL)]
    table += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    table += [(text, -float(at), 1) for at, text in enumerate(MERGED)]
    table += [(letter, -1000.0 - at, 1) for at, letter in enumerate("▁" + string.ascii_letters + string.punctuation)]
    return table


@pytest.fixture(scope="session")
def sentence_piece_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "pieces.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    texts, scores, kinds = zip(*words(), strict=True)
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class Stack:
    """Where a front listens."""

    url: str
    target: str


@dataclass(frozen=True)
class OneWorker:
    """cluster.front.dispatcher.SchedulerPort where there is no choice."""

    worker: WorkerInfo

    async def place(self, shape: object) -> Placement:
        return Placement(decode=self.worker.id, prefill=None, how="mixed", reason="the only one")

    async def withdraw(self, request: object) -> None:
        """Nobody waits."""

    async def status(self) -> ClusterStatus:
        raise NotImplementedError

    async def finished(self, outcomes: object) -> None:
        """Nobody learns here."""


@pytest.fixture(scope="session")
def front_over(loop: asyncio.AbstractEventLoop) -> Callable[..., AbstractContextManager[Stack]]:
    """(text, start) → both servers and the real dispatcher over what `start` gives: a worker's info and its port."""

    def run(work: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(WAIT_SECONDS)

    @contextmanager
    def over(text: TextModel, start: Callable[[], Awaitable[tuple[WorkerInfo, Any]]]) -> Iterator[Stack]:
        root = KvIdentity(model_digest="abcdef0123456789", weight_format="fp32", kv_dtype="fp32").root()
        identity = FrontIdentity(id=FrontId("f"), model="tiny", root=root, patience_seconds=10.0, recovery_seconds=10.0)

        async def begin() -> tuple[Dispatcher, Any]:
            info, port = await start()
            dispatcher = Dispatcher(identity, text, OneWorker(info))
            await dispatcher.meet({info.id: (info, port)})
            return dispatcher, port

        dispatcher, port = run(begin())
        http = run(serve_http(dispatcher, "127.0.0.1:0", FrontMetrics("tiny")))
        server, grpc_port = run(serve_grpc(dispatcher, "127.0.0.1:0"))
        try:
            yield Stack(f"http://127.0.0.1:{http.port}", f"127.0.0.1:{grpc_port}")
        finally:
            run(http.stop())
            run(server.stop(1))
            run(dispatcher.close())
            run(port.stop())

    return over
