"""Turns a message that can't be read into INVALID_ARGUMENT: gRPC itself would call that our bug. Knows no message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.front.grpc_calls import answering
from diptych.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cluster.front.grpc_calls import Context
    from cluster.front.request_log import RequestLog

_OURS: Final = "/diptych."


class Readable(grpc.aio.ServerInterceptor):
    """For our own services, whose methods are coroutines that take one message."""

    def __init__(self, log: RequestLog) -> None:
        self._log = log

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 (gRPC's handlers carry no types)
        """The method's handler, reading its own message."""
        handler = await continuation(handler_call_details)
        method = _method(handler_call_details)
        if handler is None or not method.startswith(_OURS):
            return handler
        streams = bool(handler.response_streaming)
        make: Any = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        behaviour = handler.unary_stream if streams else handler.unary_unary
        return make(self._reading(behaviour, handler.request_deserializer, method), None, handler.response_serializer)

    def _reading(
        self,
        behaviour: Callable[[object, Context], Awaitable[object]],
        parse: Callable[[bytes], object],
        method: str,
    ) -> Callable[[bytes, Context], Awaitable[object]]:
        async def read(data: bytes, context: Context) -> object:
            try:
                message = parse(data)
            except DecodeError as error:
                return await self._refuse(error, method, context)
            return await behaviour(message, context)

        return read

    async def _refuse(self, error: DecodeError, method: str, context: Context) -> None:
        async with answering(context, self._log.record("unread", "grpc", method.rpartition("/")[2])):
            raise InvalidRequest(f"the message can't be read: {error}; is a string not UTF-8?") from error


def _method(details: grpc.HandlerCallDetails) -> str:
    """As in /diptych.v1.InferenceService/Generate."""
    return str(cast("Any", details).method)
