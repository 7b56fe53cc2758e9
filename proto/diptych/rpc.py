"""Our errors as `google.rpc.Status` and back, for both ends of a gRPC call. Knows no service.

The reason in `ErrorInfo` is the class's name (PROMPT_TOO_LONG), so that a client raises what the front raised.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from diptych import errors
from diptych.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    LayoutMismatch,
    NoWorker,
    Overloaded,
    Rejected,
    ServingError,
    UnknownModel,
    UnknownRequest,
    WorkerLost,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

DOMAIN: Final = "diptych"
MAX_MESSAGE_BYTES: Final = 1_000
"""A status travels in trailing metadata, of which gRPC takes 8 KiB: there the message stands up to three times,
once percent-encoded."""

_CODES: Final[dict[type[object], grpc.StatusCode]] = {
    ServingError: grpc.StatusCode.INTERNAL,
    Rejected: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    UnknownRequest: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NoWorker: grpc.StatusCode.UNAVAILABLE,
    Draining: grpc.StatusCode.FAILED_PRECONDITION,
    WorkerLost: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    LayoutMismatch: grpc.StatusCode.FAILED_PRECONDITION,
}
"""The nearest base that stands here decides."""


def code_of(error: ServingError) -> grpc.StatusCode:
    """The gRPC status code of this error's class."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def reason_of(error: ServingError) -> str:
    """The class's name in the style of `ErrorInfo.reason`: PROMPT_TOO_LONG."""
    return _reason(type(error))


def to_status(error: ServingError) -> Status:
    """What the front answers with."""
    number: int = code_of(error).value[0]
    status = Status(code=number, message=_message(error))
    status.details.extend(_packed(detail) for detail in _details(error))
    return status


def from_status(status: Status) -> ServingError | None:
    """What the front raised, or None when the status isn't one of ours."""
    info, request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        # One of the three unpacks it; a kind of detail that we don't know is skipped.
        _ = detail.Unpack(info) or detail.Unpack(request) or detail.Unpack(retry)
    kind = _kinds().get(info.reason) if info.domain == DOMAIN else None
    if kind is None:
        return None
    if issubclass(kind, InvalidRequest):
        fields = [violation.field for violation in request.field_violations]
        return kind(status.message, param=fields[0] if fields else None)
    if issubclass(kind, Overloaded):
        return kind(status.message, retry_after=retry.retry_delay.ToTimedelta().total_seconds())
    return kind(status.message)


def _details(error: ServingError) -> Iterator[Message]:
    yield ErrorInfo(reason=reason_of(error), domain=DOMAIN)
    if isinstance(error, InvalidRequest) and error.param is not None:
        violation = BadRequest.FieldViolation(field=error.param, description=_message(error))
        yield BadRequest(field_violations=[violation])
    if isinstance(error, Overloaded):
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        yield RetryInfo(retry_delay=delay)


def _message(error: ServingError) -> str:
    return str(error).encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def _packed(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed


def _kinds() -> dict[str, type[ServingError]]:
    named: list[object] = [getattr(errors, name) for name in errors.__all__]
    return {_reason(kind): kind for kind in named if isinstance(kind, type) and issubclass(kind, ServingError)}


def _reason(kind: type[ServingError]) -> str:
    """Of a class that isn't in our tree (a plug-in's, a test's), the nearest base that is."""
    ours = next(base for base in kind.__mro__ if base.__module__ == errors.__name__)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", ours.__name__).upper()
