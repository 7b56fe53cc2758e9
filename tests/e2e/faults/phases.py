"""What is asked so that several requests are in a phase at once, and how one sees that they are."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from diptych import Client
    from diptych.v1.admin_pb2 import WorkerStatus

WAIT_SECONDS = 90
"""For any answer: detection, a successor, and what is left to compute on a busy machine."""
TRIES = 20
"""To find requests in a phase: on a fast machine they pass through it between two looks."""
RUNNING = 4
"""Sequences in one worker."""


@dataclass(frozen=True)
class Seen:
    """What workers and clients tell of requests under way."""

    workers: dict[str, WorkerStatus]
    heard: list[int]
    """Tokens, by request."""

    def total(self, role: str, what: str) -> int:
        return sum(getattr(worker.load, what) for name, worker in self.workers.items() if name.startswith(role))

    def speaking(self, least: int) -> int:
        """Requests of which so many tokens were heard."""
        return sum(count >= least for count in self.heard)


@dataclass(frozen=True)
class Phase:
    """What is asked so that several requests are in a phase at once, and how one sees it."""

    prompt: int
    tokens: int
    requests: int
    is_on: Callable[[Seen], bool]


PHASES = {
    "queued": Phase(600, 30, 32, lambda seen: seen.total("", "waiting_requests") > RUNNING),
    "prefilling": Phase(3000, 10, 4, lambda seen: seen.total("prefill", "waiting_tokens") > 1000),
    "prefilled": Phase(400, 700, 20, lambda seen: seen.total("prefill", "blocks_lent") > 0),
    "transferring": Phase(3000, 20, 4, lambda seen: seen.total("decode", "blocks_granted") > 0),
    "decoding": Phase(50, 500, 8, lambda seen: seen.speaking(20) >= RUNNING),
}


class Stream:
    """One request, read by a thread of its own."""

    def __init__(self, client: Client, ask: dict[str, Any], threads: ThreadPoolExecutor) -> None:
        self.heard: list[int] = []
        self._end = threads.submit(self._read, client, ask)

    def _read(self, client: Client, ask: dict[str, Any]) -> None:
        for response in client.generate(**ask):
            self.heard += response.chunk.token_ids

    @property
    def is_over(self) -> bool:
        return self._end.done()

    def wait(self) -> BaseException | None:
        """Until it ends; the error that it ended in. Raises TimeoutError."""
        return self._end.exception(WAIT_SECONDS)


def asks(name: str, run: str) -> list[dict[str, Any]]:
    """Of a tenant of its own: nothing that another run left in a cache is found."""
    phase, dice = PHASES[name], random.Random(name)
    return [
        {
            "tokens": dice.choices(range(3, 256), k=phase.prompt),
            "max_tokens": phase.tokens,
            "temperature": (0, 1.0)[place % 2],
            "seed": place,
            "ignore_eos": True,
            "tenant": run,
        }
        for place in range(phase.requests)
    ]
