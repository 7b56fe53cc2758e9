"""Requests to any OpenAI endpoint at times of our choosing, whatever became of those before. Knows no server.

`/v1/completions` with token ids, streamed: what counts is when each piece of an answer came.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_SECONDS = 600.0
VOCABULARY = range(300, 40_000)


@dataclass(frozen=True)
class Wanted:
    """One request."""

    at: float
    """Seconds after the beginning."""
    prompt: int
    """Tokens."""
    answer: int


@dataclass(eq=False)
class Spoken:
    """How it went."""

    wanted: Wanted
    sent: float = 0.0
    came: list[float] = field(default_factory=list[float])
    """When each piece came, on the clock that `sent` is on."""
    tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds."""
        return self.came[0] - self.sent

    @property
    def itl(self) -> float:
        """Mean seconds between tokens."""
        return (self.came[-1] - self.came[0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [later - earlier for earlier, later in zip(self.came, self.came[1:], strict=False)]


class Endpoint:
    """An OpenAI server's completions."""

    def __init__(self, http: str) -> None:
        """HOST:PORT."""
        self._http = http
        self._model = ""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        async with self._session.get(f"http://{self._http}/v1/models") as models:
            self._model = (await models.json())["data"][0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def ask(self, wanted: Wanted, seed: int) -> Spoken:
        """Now."""
        spoken = Spoken(wanted)
        body = {
            "model": self._model,
            "prompt": random.Random(seed).choices(VOCABULARY, k=wanted.prompt),
            "max_tokens": wanted.answer,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        spoken.sent = time.perf_counter()
        try:
            await self._read(spoken, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            spoken.error = repr(error)
        return spoken

    async def _read(self, spoken: Spoken, body: dict[str, object]) -> None:
        assert self._session, "use it as an async context"
        async with self._session.post(f"http://{self._http}/v1/completions", json=body) as response:
            if response.status != 200:
                spoken.error = f"{response.status} {(await response.text())[:200]}"
                return
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                told = json.loads(line.removeprefix(b"data: "))
                if usage := told.get("usage"):
                    spoken.tokens = usage["completion_tokens"]
                if told.get("choices"):
                    spoken.came.append(time.perf_counter())
                elif "error" in told:
                    spoken.error = str(told["error"])[:200]
        if spoken.tokens != spoken.wanted.answer and not spoken.error:
            spoken.error = f"{spoken.tokens} of {spoken.wanted.answer} tokens came"

    async def play(self, asked: Sequence[Wanted], seed: int) -> list[Spoken]:
        """Each at its time."""
        began = time.perf_counter()

        async def one(number: int, wanted: Wanted) -> Spoken:
            await asyncio.sleep(max(0.0, began + wanted.at - time.perf_counter()))
            return await self.ask(wanted, seed * 1_000_003 + number)

        return await asyncio.gather(*(one(number, wanted) for number, wanted in enumerate(asked)))


def poisson(rate: float, count: int, prompt: int, answer: int, seed: int) -> list[Wanted]:
    """Random arrivals, `rate` a second."""
    dice, at, asked = random.Random(seed), 0.0, list[Wanted]()
    for _ in range(count):
        at += dice.expovariate(rate)
        asked.append(Wanted(at, prompt, answer))
    return asked


def percentile(values: Sequence[float], share: float) -> float:
    """0 to 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
