"""Our exception tree; a front maps each class to one status and never to a guess.

* ServingError
  x Rejected            the caller's fault, nothing was spent      400 / INVALID_ARGUMENT
    - InvalidRequest    a field is wrong or can't be honoured
    - PromptTooLong     more tokens than the model or the cache can hold
    - UnknownModel      no model of that name is served            404 / NOT_FOUND
    - UnknownRequest    no record of that request is kept          404 / NOT_FOUND
  x Overloaded          ours, try again later                      429 / RESOURCE_EXHAUSTED
    - NoWorker          no live worker can take the request        503 / UNAVAILABLE
  x Draining            going away, ask elsewhere                  503 / FAILED_PRECONDITION
  x WorkerLost          a worker died with the request             502 / UNAVAILABLE
    - EngineBroke       a bug ended its engine in a step with it   goes on elsewhere, a few times
  x DeadlineExceeded    the request's own deadline passed          504 / DEADLINE_EXCEEDED
  x TransferFailed      a KV hand-off ended without a commit       recovered inside, seen in records
  x LayoutMismatch      two sides can't be joined; names both      500 / FAILED_PRECONDITION
  x Internal            a bug of ours, with the request's id       500 / INTERNAL
"""

from __future__ import annotations

__all__ = [
    "DeadlineExceeded",
    "Draining",
    "EngineBroke",
    "Internal",
    "InvalidRequest",
    "LayoutMismatch",
    "NoWorker",
    "Overloaded",
    "PromptTooLong",
    "Rejected",
    "ServingError",
    "TransferFailed",
    "UnknownModel",
    "UnknownRequest",
    "WorkerLost",
]


class ServingError(Exception):
    """Anything diptych can answer a request with instead of tokens."""


class Rejected(ServingError):
    """The caller's fault; nothing was computed."""


class InvalidRequest(Rejected):
    """A field is wrong, or asks for what this cluster can't honour.

    `param` names the field, as the OpenAI error shape does.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_invalid_request, (type(self), str(self), self.param)


class PromptTooLong(InvalidRequest):
    """Prompt plus requested tokens can never fit."""


class UnknownModel(Rejected):
    """No model of that name is served here."""


class UnknownRequest(Rejected):
    """No record of that request is kept, or none is any more."""


class Overloaded(ServingError):
    """Ours; the same request may succeed after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_overloaded, (type(self), str(self), self.retry_after)


class NoWorker(Overloaded):
    """No live worker can take the request."""


class Draining(ServingError):
    """This worker or front is going away; ask elsewhere."""


class WorkerLost(ServingError):
    """A worker died or went silent while it held the request."""


class EngineBroke(WorkerLost):
    """A bug ended the engine in a step that computed the request: it may be what breaks engines."""


class DeadlineExceeded(ServingError):
    """The request's own deadline passed."""


class TransferFailed(ServingError):
    """A KV hand-off ended without a commit; the request is recomputed, never answered from it."""


class LayoutMismatch(ServingError):
    """Two sides that can't be joined; the message names both."""


class Internal(ServingError):
    """A bug of ours; the message carries the request's id."""


def _rebuild_invalid_request(kind: type[InvalidRequest], message: str, param: str | None) -> InvalidRequest:
    return kind(message, param=param)


def _rebuild_overloaded(kind: type[Overloaded], message: str, retry_after: float) -> Overloaded:
    return kind(message, retry_after=retry_after)
