"""HTTP below the routes: JSON bodies in, event streams out, and noticing who hung up. Knows no OpenAI field.

Everything that waits for a client has a bound here: its body, and its reading of a stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cluster.front.errors import http_error
from cluster.front.patience import Patience
from diptych.errors import Internal, InvalidRequest, ServingError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from cluster.front.request_log import Record

MAX_BODY_BYTES: Final = 8 << 20
BODY_TIMEOUT_SECONDS: Final = 30.0
STALL_TIMEOUT_SECONDS: Final = 60.0
"""A client that reads nothing for so long has its stream ended and its blocks freed."""

CLEAN_UP_TIMEOUT_SECONDS: Final = 10.0

Emit: TypeAlias = "Callable[[bytes], Awaitable[None]]"
"""Writes to the client; returns when it may be given more."""
_T = TypeVar("_T")
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx and others buffer a response unless told so, and a stream would arrive in one piece.
    (b"x-accel-buffering", b"no"),
]
_log = logging.getLogger(__name__)


class ClientStalled(Exception):
    """The client stopped reading its stream."""


async def read_json(request: Request) -> object:
    """The body. Raises HTTPException 408, 413 or 415, InvalidRequest when it isn't JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(415, f"the content type is {media_type!r}; send application/json")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            body = await _read_body(request)
    except TimeoutError as error:
        raise HTTPException(408, f"the body took longer than {BODY_TIMEOUT_SECONDS:g} s to arrive") from error
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[object, object, _T]) -> _T:
    """What `work` returns; cancelled, and ClientDisconnect raised, when the client hangs up first."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_wait_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        watching.cancel()
        await _end(working)
    raise ClientDisconnect


async def _end(task: asyncio.Task[_T]) -> None:
    """Cancels and waits, so that the generators inside are closed and nothing of the request runs on."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait((task,), timeout=CLEAN_UP_TIMEOUT_SECONDS)
    error = task.exception() if task.done() and not task.cancelled() else None
    if error is not None:
        _log.error("a cancelled request ended in an error", exc_info=error)


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A text/event-stream as a response.

    Its headers leave with the first event, so that an error before any token still has its own status.
    """

    def __init__(
        self, produce: Callable[[Emit], Awaitable[None]], request_id: str, patience: Patience, record: Record
    ) -> None:
        self._record = record
        self._produce = produce
        self._patience = patience
        self._request_id = request_id
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send))
        except ClientDisconnect:
            return
        except ClientStalled:
            # The response stays incomplete, and the server hangs up.
            _log.warning("%s: the client read nothing for %g s", self._request_id, STALL_TIMEOUT_SECONDS)

    async def _run(self, send: Send) -> None:
        async def emit(data: bytes) -> None:
            await self._emit(send, data)

        try:
            await self._produce(emit)
        except ServingError as error:
            self._record.fail(error)
            await self._emit_error(send, error)
        except ClientStalled:
            raise
        except Exception:
            # The last door: the client learns that it failed, the log learns why.
            if self._started:
                await self._emit_error(send, Internal(f"internal error; request {self._request_id}"))
                await self._finish(send)
            raise
        await self._finish(send)

    async def _emit(self, send: Send, data: bytes) -> None:
        try:
            await self._patience.wait(self._send(send, data), STALL_TIMEOUT_SECONDS)
        except TimeoutError as error:
            raise ClientStalled from error

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _emit_error(self, send: Send, error: ServingError) -> None:
        if not self._started:
            raise error
        await self._emit(send, b"data: " + json.dumps(http_error(error).body).encode() + b"\n\n")

    async def _finish(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"", "more_body": False})
