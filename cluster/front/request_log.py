"""One line when a request begins and one when it ends, over both protocols. Knows neither.

What a request says is nobody's business: no line holds text of a prompt or an answer, unless `log.prompts` asks for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from cluster.journal import FIELDS
from diptych.errors import DeadlineExceeded, Internal, Rejected, ServingError
from diptych.rpc import reason_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.front.service import Ask, Delta, Usage
    from cluster.front.tokenizer import TextModel

_log = logging.getLogger(__name__)
_ID_CHARACTERS: Final = 128
_NO_FAULT_OF_OURS: Final = (Rejected, DeadlineExceeded, asyncio.CancelledError)


class RequestLog:
    """Of one front."""

    def __init__(self, shows: TextModel | None = None) -> None:
        """`shows` turns prompts into text, which then stands in the log."""
        self._shows = shows

    def record(self, request_id: str, wire: str, method: str) -> Record:
        """Of a request that has just come. `end` it."""
        return Record(request_id[:_ID_CHARACTERS], wire, method, self._shows)


class Record:
    """What one request was and what became of it."""

    def __init__(self, request_id: str, wire: str, method: str, shows: TextModel | None) -> None:
        self.request_id = request_id
        self._name: dict[str, object] = {"request_id": request_id, "wire": wire, "method": method}
        self._shows = shows
        self._came = time.perf_counter()
        self._first: float | None = None
        self._tokens = 0
        self._asks = 0
        self._usages: list[Usage] = []
        self._finishes: list[str] = []
        self._pieces: list[str] = []
        self._error: BaseException | None = None

    def begin(self, asks: Sequence[Ask]) -> None:
        """It was understood: these answers are wanted."""
        self._asks = len(asks)
        params = asks[0].params
        fields = {
            "answers": len(asks) if len(asks) > 1 else None,
            "prompt_tokens": sum(len(ask.tokens) for ask in asks),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "prompt": " | ".join(self._shows.decode(ask.tokens) for ask in asks) if self._shows else None,
        }
        self._write(logging.INFO, "request begins", fields)

    def take(self, delta: Delta) -> None:
        """The next piece of one of its answers."""
        if delta.tokens:
            self._tokens += len(delta.tokens)
            self._first = self._first or time.perf_counter() - self._came
        if self._shows:
            self._pieces.append(delta.text)
        if delta.finish is not None:
            self._finishes.append(delta.finish)
            if delta.usage is not None:
                self._usages.append(delta.usage)

    def fail(self, error: BaseException) -> None:
        """What ended it early: the first, but what was cancelled was cancelled by something."""
        if self._error is None or isinstance(self._error, asyncio.CancelledError):
            self._error = error

    def end(self, status: int | str) -> None:
        """A look at health or metrics that went well is told at debug."""
        self._write(self._level(status), "request ends", {"status": status, **self._outcome(), **self._figures()})

    def _level(self, status: int | str) -> int:
        match self._error:
            case None:
                return logging.INFO if self._asks or status not in (200, "OK") else logging.DEBUG
            case error if isinstance(error, _NO_FAULT_OF_OURS):
                return logging.INFO
            case Internal():
                return logging.ERROR
            case ServingError():
                return logging.WARNING
            case _:
                return logging.ERROR

    def _outcome(self) -> dict[str, object]:
        match self._error:
            case None:
                return {"finish": _distinct(self._finishes)}
            case asyncio.CancelledError():
                return {"finish": "cancelled"}
            case ServingError() as error:
                # A refusal quotes what was sent: only the field at fault is named.
                reason = None if isinstance(error, _NO_FAULT_OF_OURS) else str(error)
                return {"error": reason_of(error).lower(), "param": getattr(error, "param", None), "reason": reason}
            case error:
                return {"error": type(error).__name__}

    def _figures(self) -> dict[str, object]:
        usages = self._usages
        served = [usage.served for usage in usages]
        told = sum(usage.completion_tokens for usage in usages) if len(usages) == self._asks else self._tokens
        return {
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages) if usages else None,
            "cached_tokens": sum(one.cached_tokens for one in served) if usages else None,
            "completion_tokens": told if self._asks else None,
            "how": _distinct([one.how for one in served]),
            "prefill_worker": _distinct([one.prefill_worker for one in served]),
            "decode_worker": _distinct([one.decode_worker for one in served]),
            "first_token_seconds": self._first and round(self._first, 6),
            "seconds": round(time.perf_counter() - self._came, 6),
            "answer": "".join(self._pieces) if self._pieces else None,
        }

    def _write(self, level: int, message: str, fields: Mapping[str, object]) -> None:
        if _log.isEnabledFor(level):
            _log.log(level, message, extra={FIELDS: {**self._name, **fields}})


def _distinct(words: Sequence[str]) -> str | None:
    return ",".join(dict.fromkeys(words)) or None
