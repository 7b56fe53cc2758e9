"""Frames arrive whole and in order, from one who knows the secret to one who does; a cut line ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress

import pytest

from diptych.errors import WorkerLost
from diptych.token_line import TokenLineServer, listen

SECRET = b"s" * 32
BIG = bytes(range(256)) * 20_000


class Speaker:
    """Gives each front the same frames, then waits for its end."""

    def __init__(self, *frames: bytes, stays: bool = False) -> None:
        self.frames = frames
        self.stays = stays
        self.names: list[str] = []
        self.left = asyncio.Event()

    async def speak(self, name: str) -> AsyncGenerator[bytes, None]:
        self.names.append(name)
        try:
            for frame in self.frames:
                yield frame
            if self.stays:
                await asyncio.Event().wait()
        finally:
            self.left.set()


@asynccontextmanager
async def serving(speaker: Speaker) -> AsyncGenerator[str, None]:
    server = TokenLineServer(SECRET, speaker.speak)
    try:
        yield await server.open("127.0.0.1")
    finally:
        server.close()
        await server.wait_told(10)


def in_time(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def test_every_frame_arrives_in_order_and_then_the_end() -> None:
    async def test() -> None:
        speaker = Speaker(b"", b"one", BIG, b"two")
        async with serving(speaker) as address:
            assert [frame async for frame in await listen(address, "front-0", SECRET)] == [b"", b"one", BIG, b"two"]
        assert speaker.names == ["front-0"]

    in_time(test)


def test_a_front_that_leaves_is_noticed_while_nothing_is_said() -> None:
    async def test() -> None:
        speaker = Speaker(b"one", stays=True)
        async with serving(speaker) as address:
            async with aclosing(await listen(address, "front-0", SECRET)) as line:
                assert await anext(line) == b"one"
            await speaker.left.wait()

    in_time(test)


def test_who_does_not_know_the_secret_hears_nothing() -> None:
    async def test() -> None:
        speaker = Speaker(b"one")
        async with serving(speaker) as address:
            with pytest.raises(WorkerLost):
                await listen(address, "front-0", b"another")
            host, port = address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n" + bytes(200))
            told = b""
            with suppress(ConnectionError):
                told = await reader.read()
            assert len(told) <= 16
            writer.close()
            await writer.wait_closed()
        assert speaker.names == []

    in_time(test)


def test_a_front_does_not_believe_who_only_repeats_what_it_said() -> None:
    async def parrot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(16))
        said = await reader.readexactly(16 + 1 + 7 + 32)
        writer.write(said[-32:])
        writer.close()

    async def test() -> None:
        async with await asyncio.start_server(parrot, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(WorkerLost, match="secret"):
                await listen(f"127.0.0.1:{port}", "front-0", SECRET)

    in_time(test)


def test_nobody_there_is_a_lost_worker() -> None:
    async def test() -> None:
        async with serving(Speaker()) as address:
            pass
        with pytest.raises(WorkerLost, match="no line"):
            await listen(address, "front-0", SECRET)

    in_time(test)


@pytest.mark.parametrize("damage", ["flip", "repeat", "drop"])
def test_a_frame_that_was_changed_repeated_or_left_out_ends_the_line(damage: str) -> None:
    """By someone between the two, who lets them meet."""
    frame_bytes = 4 + 16 + 3
    hello = 16 + 32

    async def test() -> None:
        async with serving(Speaker(b"one", b"two", b"six")) as address:
            host, port = address.split(":")

            async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
                writer.write(await inner_reader.readexactly(16))
                inner_writer.write(await reader.readexactly(16 + 1 + 7 + 32))
                writer.write(await inner_reader.readexactly(hello - 16))
                frames = [await inner_reader.readexactly(frame_bytes) for _ in range(3)]
                if damage == "flip":
                    frames[1] = frames[1][:-1] + bytes([frames[1][-1] ^ 1])
                elif damage == "repeat":
                    frames.insert(1, frames[0])
                else:
                    del frames[1]
                writer.write(b"".join(frames))
                for each in (inner_writer, writer):
                    each.close()
                    await each.wait_closed()

            async with await asyncio.start_server(between, "127.0.0.1", 0) as server:
                port_between = server.sockets[0].getsockname()[1]
                line = await listen(f"127.0.0.1:{port_between}", "front-0", SECRET)
                assert [frame async for frame in line] == [b"one"]

    in_time(test)
