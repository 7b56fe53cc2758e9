"""The OpenAI HTTP front: routes, and the server they run in. Knows neither Ray nor how a request is placed."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.front.errors import error_body, http_error
from cluster.front.listening import check_free, split
from cluster.front.openai_api import OpenAiApi, record_of, request_id_of
from cluster.front.openapi import document
from cluster.front.request_log import RequestLog
from cluster.front.tokenize_api import TokenizeApi
from cluster.observe.metrics import FrontMetrics
from diptych.errors import Internal, ServingError

if TYPE_CHECKING:
    from collections.abc import Generator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cluster.front.service import Service

GRACE_SECONDS: Final = 5
"""How long running answers may go on once the server stops."""
STOP_SECONDS: Final = 5.0
"""Bound on everything about starting and stopping that takes milliseconds."""

_NOBODY_LISTENS: Final = 499
"""nginx's status for a client that hung up first; only the log sees it."""
_ID_PREFIXES: Final = {"/v1/chat/completions": "chatcmpl", "/v1/completions": "cmpl"}


class Requests:
    """Gives every request an id, its response the header x-request-id with it, and the log its lines."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["request_id"] = f"{_ID_PREFIXES.get(scope['path'], 'req')}-{secrets.token_hex(16)}"
        record = scope["record"] = self._log.record(request_id, "http", f"{scope['method']} {scope['path'][:100]}")
        status = _NOBODY_LISTENS

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                nonlocal status
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except BaseException as error:
            status = 500
            record.fail(error)
            raise
        finally:
            record.end(status)


def build_app(service: Service, metrics: FrontMetrics | None = None, log: RequestLog | None = None) -> Starlette:
    """The HTTP front. With `metrics` given, `service` is what it observes already."""
    if metrics is None:
        metrics = FrontMetrics(service.model_name)
        service = metrics.observed(service)
    api, tokenize = OpenAiApi(service, metrics, int(time.time())), TokenizeApi(service)
    described = json.dumps(document(), ensure_ascii=False).encode()

    async def describe(_: Request) -> Response:
        return Response(described, media_type="application/json")

    routes = [
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{id:path}", api.model),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/openapi.json", describe),
        Route("/health", api.ready),
        Route("/health/live", api.live),
        Route("/health/ready", api.ready),
        Route("/version", api.version),
        Route("/metrics", api.exposition),
    ]
    handlers = {
        ServingError: _answer_serving_error,
        HTTPException: _answer_http_error,
        ClientDisconnect: _answer_nobody,
        Exception: _answer_bug,
    }
    return Starlette(routes=routes, middleware=[Middleware(Requests, log or RequestLog())], exception_handlers=handlers)


async def _answer_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    record_of(request).fail(error)
    answer = http_error(error)
    return JSONResponse(answer.body, answer.status, answer.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large", 415: "media_type"}
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    body = error_body(error.status_code, message, code=code.get(error.status_code, "http_error"))
    return JSONResponse(body, error.status_code, error.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client hung up: whatever is returned goes nowhere."""
    return Response(status_code=_NOBODY_LISTENS)


async def _answer_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again afterwards, and the server logs it."""
    answer = http_error(Internal(f"internal error; request {request_id_of(request)}"))
    return JSONResponse(answer.body, answer.status, {"x-request-id": request_id_of(request)})


class _EmbeddedServer(uvicorn.Server):
    """uvicorn inside somebody else's event loop: it says when it listens, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._ending = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        # uvicorn's own wakes ten times a second, to look whether it should end.
        seconds = 0
        while not await self.on_tick(10 * seconds):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 1)
            seconds += 1

    def end(self) -> None:
        """Takes no more requests; `serve` returns when those under way are over or cancelled."""
        self.should_exit = True
        self._ending.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A running HTTP front."""

    port: int
    _server: _EmbeddedServer
    _serving: asyncio.Task[None]

    async def stop(self, grace_seconds: int = GRACE_SECONDS) -> None:
        """Takes no more requests, lets running ones go on for the grace period, then cancels them."""
        self._server.config.timeout_graceful_shutdown = grace_seconds
        self._server.end()
        await asyncio.wait_for(self._serving, grace_seconds + STOP_SECONDS)
        # uvicorn cancels requests without waiting; their generators still have to close.
        cancelled = [task for task in self._server.server_state.tasks if not task.done()]
        if cancelled:
            await asyncio.wait(cancelled, timeout=STOP_SECONDS)


async def serve_http(
    service: Service,
    host_port: str,
    metrics: FrontMetrics | None = None,
    log: RequestLog | None = None,
    *,
    beside: bool = False,
) -> HttpServer:
    """Listens on "host:port" (port 0: any) in the caller's event loop. Raises OSError when it can't.

    `beside` one that listens there and is about to end.
    """
    listener = _listen(host_port, beside=beside)
    config = uvicorn.Config(
        build_app(service, metrics, log),
        access_log=False,
        lifespan="off",
        log_config=None,
        server_header=False,
        ws="none",
    )
    server = _EmbeddedServer(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait_for(server.listening.wait(), STOP_SECONDS)
    return HttpServer(listener.getsockname()[1], server, serving)


def _listen(host_port: str, *, beside: bool) -> socket.socket:
    family, address = split(host_port)
    try:
        if not beside:
            check_free(host_port)
        listener = socket.create_server(address, family=family, backlog=2048, reuse_port=True)
        # asyncio sets it only where a socket names its protocol, which this one's don't: without it a
        # response's body waits for the acknowledgement of its head, up to 40 ms. Accepted ones inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise OSError(
            error.errno, f"HTTP can't listen on {host_port}: {error.strerror}; choose another --http"
        ) from error
