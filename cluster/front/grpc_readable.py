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

_OURS: Final = "/diptych."


class Readable(grpc.aio.ServerInterceptor):
    """For our own services, whose methods are coroutines that take one message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 (gRPC's handlers carry no types)
        """The method's handler, reading its own message."""
        handler = await continuation(handler_call_details)
        if handler is None or not _method(handler_call_details).startswith(_OURS):
            return handler
        streams = bool(handler.response_streaming)
        make: Any = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        behaviour = handler.unary_stream if streams else handler.unary_unary
        return make(_reading(behaviour, handler.request_deserializer), None, handler.response_serializer)


def _method(details: grpc.HandlerCallDetails) -> str:
    """As in /diptych.v1.InferenceService/Generate."""
    return str(cast("Any", details).method)


def _reading(
    behaviour: Callable[[object, Context], Awaitable[object]], parse: Callable[[bytes], object]
) -> Callable[[bytes, Context], Awaitable[object]]:
    async def read(data: bytes, context: Context) -> object:
        async with answering(context, "unread"):
            message = _parsed(data, parse)
        return await behaviour(message, context)

    return read


def _parsed(data: bytes, parse: Callable[[bytes], object]) -> object:
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidRequest(f"the message can't be read: {error}; is a string not UTF-8?") from error
