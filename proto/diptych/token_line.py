"""The straight way of tokens from a worker to a front: a TCP connection, frames, and proof of who is at the ends.

Both sides show that they know the cluster's secret before either believes the other, and each frame carries a
keyed hash over its number and its bytes: nobody on the way can add, change, repeat or leave out one unnoticed.
What is sent can be read on the way, as KV can. Knows asyncio's streams; not what the frames say.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from diptych.errors import WorkerLost

_T = TypeVar("_T")
_HELLO_SECONDS: Final = 5.0
"""Meeting takes milliseconds; who takes longer is not let in."""
_NONCE_BYTES: Final = 16
_PROOF_BYTES: Final = 32
_MAC_BYTES: Final = 16
_MOST_BYTES: Final = 256 << 20
"""Of one frame: a step's tokens are kilobytes, the log-probabilities of long prompts megabytes."""
_HEADER: Final = struct.Struct("<I")
_NUMBER: Final = struct.Struct("<Q")
_ENDS: Final = (OSError, asyncio.IncompleteReadError)


class TokenLineServer:
    """A worker's side. `frames(name)` gives what the front of that name is to hear, for as long as it is iterated."""

    def __init__(self, secret: bytes, frames: Callable[[str], AsyncGenerator[bytes, None]]) -> None:
        self._secret = secret
        self._frames = frames
        self._server: asyncio.Server | None = None
        self._speaking: set[asyncio.Task[None]] = set()

    async def open(self, host: str) -> str:
        """Where fronts dial: HOST:PORT on a free port. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, host, 0)
        address = self._server.sockets[0].getsockname()
        return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"

    def close(self) -> None:
        """Nobody new is let in. Who listens hears all that its `frames` still gives."""
        if self._server:
            self._server.close()

    async def wait_told(self, timeout_seconds: float) -> None:
        """After `close`: until everyone heard the end, or so long."""
        if self._speaking:
            await asyncio.wait(self._speaking, timeout=timeout_seconds)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._speaking.add(task)
        task.add_done_callback(self._speaking.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # What was written is with the kernel when the next is asked for: the last words before an exit, too.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            name, key = await _in_time(self._greet(reader, writer))
            listening = asyncio.ensure_future(reader.read(1))  # nothing comes but the end
            speaking = asyncio.ensure_future(self._speak(name, key, writer))
            await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
            for task in (listening, speaking):
                task.cancel()
                with suppress(asyncio.CancelledError, *_ENDS):
                    await task
        except (WorkerLost, *_ENDS):
            pass  # a stranger, or one that left while it was greeted
        finally:
            await _close(writer)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, bytes]:
        ours = secrets.token_bytes(_NONCE_BYTES)
        writer.write(ours)
        theirs = await reader.readexactly(_NONCE_BYTES)
        name = await reader.readexactly((await reader.readexactly(1))[0])
        meeting = ours + theirs + name
        if not hmac.compare_digest(await reader.readexactly(_PROOF_BYTES), _proof(self._secret, b"front", meeting)):
            raise WorkerLost("a front with another secret")
        writer.write(_proof(self._secret, b"worker", meeting))
        return name.decode(), _proof(self._secret, b"frames", meeting)

    async def _speak(self, name: str, key: bytes, writer: asyncio.StreamWriter) -> None:
        number = 0
        frames = self._frames(name)
        try:
            async for frame in frames:
                writer.write(_HEADER.pack(len(frame)) + _mac(key, number, frame) + frame)
                await writer.drain()
                number += 1
        finally:
            await frames.aclose()


async def listen(address: str, name: str, secret: bytes) -> AsyncGenerator[bytes, None]:
    """A front's side: the frames, until the worker closes or the line is cut, which look the same.

    Raises WorkerLost when the worker can't be reached or knows another secret. `name` has at most 255 bytes.
    """
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await _in_time(asyncio.open_connection(host.strip("[]"), int(port)))
    except OSError as error:
        raise WorkerLost(f"no line to {address}: {error}") from error
    try:
        key = await _in_time(_enter(reader, writer, name, secret))
    except (WorkerLost, *_ENDS) as error:
        await _close(writer)
        raise WorkerLost(f"no line to {address}: {error}") from error
    return _read(reader, writer, key)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def _in_time(what: Awaitable[_T]) -> _T:
    try:
        return await asyncio.wait_for(what, _HELLO_SECONDS)
    except TimeoutError:
        raise WorkerLost(f"no greeting within {_HELLO_SECONDS:g} s") from None


async def _enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, secret: bytes) -> bytes:
    ours, called = secrets.token_bytes(_NONCE_BYTES), name.encode()
    theirs = await reader.readexactly(_NONCE_BYTES)
    meeting = theirs + ours + called
    writer.write(ours + bytes([len(called)]) + called + _proof(secret, b"front", meeting))
    if not hmac.compare_digest(await reader.readexactly(_PROOF_BYTES), _proof(secret, b"worker", meeting)):
        raise WorkerLost("a worker with another secret")
    return _proof(secret, b"frames", meeting)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> AsyncGenerator[bytes, None]:
    number = 0
    try:
        while True:
            header = await reader.readexactly(_HEADER.size + _MAC_BYTES)
            (length,) = _HEADER.unpack_from(header)
            if length > _MOST_BYTES:
                return
            frame = await reader.readexactly(length)
            if not hmac.compare_digest(header[_HEADER.size :], _mac(key, number, frame)):
                return  # somebody else's word: as good as cut
            yield frame
            number += 1
    except _ENDS:
        return
    finally:
        await _close(writer)


def _mac(key: bytes, number: int, frame: bytes) -> bytes:
    return hashlib.blake2b(_NUMBER.pack(number) + frame, key=key, digest_size=_MAC_BYTES).digest()


def _proof(secret: bytes, side: bytes, meeting: bytes) -> bytes:
    return hashlib.blake2b(meeting, key=secret[:64], person=side.ljust(16, b"\0"), digest_size=_PROOF_BYTES).digest()
