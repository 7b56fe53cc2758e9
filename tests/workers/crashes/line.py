"""Calls between processes over a Unix socket: what Ray is in a cluster, without Ray. Knows no method."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from diptych.errors import ServingError, WorkerLost

_HEADER_BYTES = 8


class Line:
    """The calling end. A call to a process that died, or dies before it answers, raises WorkerLost."""

    def __init__(self, who: str, path: str) -> None:
        self._who = who
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Queue[tuple[bool, Any]]] = {}
        self._opening = asyncio.Lock()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        def call(*arguments: object) -> Awaitable[Any]:
            return self._call(name, *arguments)

        return call

    async def outbox(self, front: str) -> AsyncGenerator[Any, None]:
        """A stream: every item, until the other side ends it or dies."""
        with suppress(WorkerLost):
            async for ok, item in self._answers("outbox", front):
                if not ok:
                    return
                yield item

    async def close(self) -> None:
        if self._writer and self._reading:
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()
            await self._reading

    async def _call(self, name: str, *arguments: object) -> object:
        async for ok, answer in self._answers(name, *arguments):
            if ok:
                return answer
            raise answer
        raise AssertionError

    async def _answers(self, name: str, *arguments: object) -> AsyncGenerator[tuple[bool, Any], None]:
        async with self._opening:
            if self._writer is None:
                await self._open()
        number = next(self._numbers)
        answers = self._waiting[number] = asyncio.Queue()
        try:
            if self._reading is None or self._reading.done():
                raise WorkerLost(f"{self._who} died")
            assert self._writer is not None
            send(self._writer, (number, name, arguments))
            while True:
                yield await answers.get()
        finally:
            del self._waiting[number]

    async def _open(self) -> None:
        try:
            reader, self._writer = await asyncio.open_unix_connection(self._path)
        except OSError as error:
            raise WorkerLost(f"{self._who} can't be reached: {error}") from error
        self._reading = asyncio.ensure_future(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                number, *answer = await receive(reader)
                if waiting := self._waiting.get(number):
                    waiting.put_nowait(tuple(answer))
        assert self._writer is not None
        self._writer.close()
        for waiting in self._waiting.values():
            waiting.put_nowait((False, WorkerLost(f"{self._who} died")))


async def answer(
    methods: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tasks: set[asyncio.Task[None]]
) -> None:
    """The answering end of one connection, until it ends."""
    with suppress(OSError, asyncio.IncompleteReadError):
        while True:
            number, name, arguments = await receive(reader)
            task = asyncio.ensure_future(_answer(getattr(methods, name), number, arguments, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    writer.close()


async def _answer(method: Any, number: int, arguments: tuple[Any, ...], writer: asyncio.StreamWriter) -> None:
    try:
        found = method(*arguments)
        if isinstance(found, AsyncGenerator):
            async for item in found:
                send(writer, (number, True, item))
            send(writer, (number, False, None))
        else:
            send(writer, (number, True, await found))
    except ServingError as error:
        send(writer, (number, False, error))


def send(writer: asyncio.StreamWriter, what: object) -> None:
    packed = pickle.dumps(what)
    if not writer.is_closing():
        writer.write(len(packed).to_bytes(_HEADER_BYTES, "little") + packed)


async def receive(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(_HEADER_BYTES), "little")
    return pickle.loads(await reader.readexactly(size))
