"""What one answer's workers said, in order and once. Knows fencing, not text or networks.

Everything carries (attempt, choice, index): only the current attempt and the next index is
accepted, so a resumed zombie or a late prefill can't speak twice. An attempt's first token comes
from prefill and the others from decode, on streams of their own: one that is early waits here.
"""

from __future__ import annotations

import asyncio

from cluster.front.patience import Patience
from diptych.errors import ServingError, WorkerLost
from diptych.types import Emission, Failure, Outgoing


class Inbox:
    """Of one request. Lives on the front's event loop."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.attempt = 0
        self.said: list[int] = []
        """Tokens accepted so far, of all attempts."""
        self._start = 0
        """The index at which this attempt goes on."""
        self._first: Emission | None = None
        self._early: dict[int, Emission] = {}
        self._ready: list[Emission] = []
        self._error: ServingError | None = None
        self._wake = asyncio.Event()

    @property
    def accepted(self) -> int:
        """How many tokens were."""
        return len(self.said)

    @property
    def spoke(self) -> bool:
        """Whether a token of this attempt was accepted."""
        return len(self.said) > self._start

    def put(self, outgoing: Outgoing) -> None:
        """Anything a worker said about this request."""
        if outgoing.attempt != self.attempt or self._error is not None:
            return
        if isinstance(outgoing, Failure):
            self.fail(outgoing.error)
            return
        if outgoing.index == self._start:
            self._check_first(outgoing)
        if outgoing.index >= len(self.said):
            self._early.setdefault(outgoing.index, outgoing)
        while (emission := self._early.pop(len(self.said), None)) is not None:
            self._ready.append(emission)
            self.said.append(emission.token)
        if self._ready:
            self._wake.set()

    def _check_first(self, emission: Emission) -> None:
        """Decode that lost its prefill chooses the first token anew: where numerics differ, perhaps another.

        What follows it would not follow what the client has. (Prefill's own, if late, is no contradiction.)
        """
        if self._first is None:
            self._first = emission
        elif emission.token != self._first.token and not (emission.served and emission.served.how == "remote"):
            self.fail(WorkerLost(f"{emission.request}: the worker that spoke the first token was lost"))

    def fail(self, error: ServingError) -> None:
        """No more tokens will come; those that came are read first."""
        self._error = self._error or error
        self._wake.set()

    def restart(self) -> None:
        """Another attempt goes on where the last one ended. What was accepted has been read."""
        assert not self._ready, "tokens of the last attempt wait to be read"
        self.attempt += 1
        self._start = len(self.said)
        self._first = None
        self._early.clear()
        self._error = None
        self._wake.clear()

    async def wait_next(self, timeout_seconds: float) -> list[Emission]:
        """What came since; raises what ended the answer, or TimeoutError when nothing came."""
        if not self._wake.is_set():
            await self._patience.wait(self._wake.wait(), timeout_seconds)
        self._wake.clear()
        ready, self._ready = self._ready, []
        if not ready and self._error:
            raise self._error
        if self._error:
            self._wake.set()  # the error is for the next reading
        return ready
