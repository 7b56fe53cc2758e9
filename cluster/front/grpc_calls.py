"""The ends of a gRPC call: its errors as rich statuses, its deadline, its cancel. Knows no message of ours."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, cast

from grpc_status import rpc_status

from cluster.front.answering import within
from cluster.front.patience import Patience
from cluster.front.request_log import Record
from diptych.errors import DeadlineExceeded, Internal, ServingError
from diptych.rpc import code_of, to_status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    import grpc
    from google.protobuf.message import Message
    from google.rpc.status_pb2 import Status

_log = logging.getLogger(__name__)


class Context(Protocol):
    """What we use of `grpc.aio.ServicerContext`, which carries no types."""

    def time_remaining(self) -> float | None:
        """Seconds to the caller's deadline; None without one."""
        ...

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """Once, before the first message."""
        ...

    async def write(self, message: Message) -> None:
        """Sends one message of a stream; returns when the transport may be given more."""
        ...

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call. Always raises."""
        ...

    async def abort_with_status(self, status: grpc.Status) -> None:
        """Ends the call. Always raises."""
        ...


@asynccontextmanager
async def answering(context: Context, record: Record) -> AsyncGenerator[None]:
    """Ends the call with a status that says what went wrong, and at the caller's deadline at the latest."""
    status = "OK"
    try:
        async with within(context.time_remaining()):
            yield
    except ServingError as error:
        status = code_of(error).name
        record.fail(error)
        await context.abort_with_status(_status(error))
    except Exception as error:
        # The last door: the client learns that it failed, the log learns why.
        status = "INTERNAL"
        record.fail(error)
        _log.exception("request %s failed", record.request_id)
        await context.abort_with_status(_status(Internal(f"internal error; request {record.request_id}")))
    except BaseException as error:
        status = "CANCELLED"
        record.fail(error)
        raise
    finally:
        record.end(status)


def _status(error: ServingError) -> grpc.Status:
    # grpc_status ships no types.
    convert = cast(
        "Callable[[Status], grpc.Status]",
        rpc_status.to_status,  # pyright: ignore[reportUnknownMemberType]
    )
    return convert(to_status(error))


async def write_within(patience: Patience, context: Context, message: Message, timeout_seconds: float) -> None:
    """Raises DeadlineExceeded when the client doesn't read for that long."""
    try:
        await patience.wait(context.write(message), timeout_seconds)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the client read nothing for {timeout_seconds:g} s") from error
