"""What an error looks like over HTTP: a status and OpenAI's error object. Knows neither requests nor responses.

The gRPC side of the same tree is `diptych.rpc`, which the client shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from diptych.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    LayoutMismatch,
    NoWorker,
    Overloaded,
    PromptTooLong,
    Rejected,
    ServingError,
    UnknownModel,
    UnknownRequest,
    WorkerLost,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpError:
    """One error, ready to be sent: `body` is OpenAI's error shape."""

    status: int
    body: dict[str, object]
    headers: dict[str, str]


_ANSWERS: Final[dict[type[object], tuple[int, str]]] = {
    ServingError: (500, "internal_error"),
    Rejected: (400, "invalid_value"),
    InvalidRequest: (400, "invalid_value"),
    PromptTooLong: (400, "context_length_exceeded"),
    UnknownModel: (404, "model_not_found"),
    UnknownRequest: (404, "request_not_found"),
    Overloaded: (429, "overloaded"),
    NoWorker: (503, "no_worker"),
    Draining: (503, "draining"),
    WorkerLost: (502, "worker_lost"),
    DeadlineExceeded: (504, "deadline_exceeded"),
    LayoutMismatch: (500, "layout_mismatch"),
}
"""HTTP status and OpenAI's `code`; the nearest base that stands here decides."""


def http_error(error: ServingError) -> HttpError:
    """The answer to a request that ended in this error."""
    status, code = next(_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS)
    param = error.param if isinstance(error, InvalidRequest) else "model" if isinstance(error, UnknownModel) else None
    headers = {"retry-after": str(math.ceil(error.retry_after))} if isinstance(error, Overloaded) else {}
    return HttpError(status=status, body=error_body(status, str(error), code=code, param=param), headers=headers)


def error_body(status: int, message: str, *, code: str, param: str | None = None) -> dict[str, object]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": _type(status), "param": param, "code": code}}


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
