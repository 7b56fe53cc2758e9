"""Sends requests when their time has come, however the cluster is doing. Knows the client, no trace.

Open loop: a slow cluster gets no fewer requests. Only their number under way is bounded, by what a
connection carries; how late that made the latest is told.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from diptych.errors import ServingError
from diptych.rpc import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.replay.prompts import Wanted
    from diptych.async_client import AsyncClient
    from diptych.v1.admin_pb2 import Explanation

AT_ONCE: Final = 1000
"""Under way at most: a connection's streams."""
_EXPLAINING: Final = 16
_TOLD_SECONDS: Final = 0.5
"""By then the front has told the scheduler how the last answer went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How one request went, as its client saw it."""

    request_id: str
    prompt_tokens: int
    late_seconds: float
    """Sent so long after its time."""
    ttft_seconds: float | None = None
    itl_seconds: float | None = None
    """Mean; None with fewer than two tokens."""
    seconds: float = 0.0
    tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    """The error's reason; empty when the answer is whole."""
    predicted_ttft_seconds: float | None = None
    """And what came about, both from the placement on; None where no record was found."""
    placed_ttft_seconds: float | None = None


class Player:
    """Of one replay."""

    def __init__(self, client: AsyncClient, speed: float, told: Callable[[int], None]) -> None:
        """`told` hears how many answers are over."""
        self._client = client
        self._speed = speed
        self._told = told
        self._over = 0
        self._run = f"replay-{secrets.token_hex(4)}"
        self._room = asyncio.Semaphore(AT_ONCE)

    async def play(self, requests: Sequence[Wanted]) -> list[Played]:
        """All of them, in the order of their numbers."""
        began = asyncio.get_running_loop().time()
        first = requests[0].arrival
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[Played]] = []
            for number, wanted in enumerate(requests):
                due = began + (wanted.arrival - first) / self._speed
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                await self._room.acquire()
                tasks.append(group.create_task(self._one(number, wanted, due)))
        return [task.result() for task in tasks]

    async def explained(self, played: Sequence[Played], keep: int) -> list[Played]:
        """With what was predicted, for the latest `keep`: the cluster remembers no more."""
        await asyncio.sleep(_TOLD_SECONDS)
        gate = asyncio.Semaphore(_EXPLAINING)

        async def one(request: Played) -> Played:
            async with gate:
                return await self._explained(request)

        return [*played[:-keep], *await asyncio.gather(*map(one, played[-keep:]))]

    async def _one(self, number: int, wanted: Wanted, due: float) -> Played:
        loop = asyncio.get_running_loop()
        sent, times, cached, error = loop.time(), list[float](), 0, ""
        request_id = f"{self._run}-{number}"
        try:
            async for response in self._client.generate(
                tokens=wanted.prompt,
                max_tokens=len(wanted.answer),
                forced=wanted.answer,
                temperature=0.0,
                ignore_eos=True,
                request_id=request_id,
            ):
                if response.HasField("complete"):
                    cached = response.complete.usage.cached_tokens
                else:
                    times += [loop.time()] * len(response.chunk.token_ids)
        except ServingError as refusal:
            error = reason_of(refusal).lower()
        finally:
            self._room.release()
        self._over += 1
        self._told(self._over)
        return Played(
            request_id=request_id,
            prompt_tokens=len(wanted.prompt),
            late_seconds=sent - due,
            ttft_seconds=times[0] - sent if times else None,
            itl_seconds=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
            seconds=loop.time() - sent,
            tokens=len(times),
            cached_tokens=cached,
            error=error,
        )

    async def _explained(self, played: Played) -> Played:
        with suppress(ServingError):
            [record] = (await self._client.explain(played.request_id)).explanations
            return _with_prediction(played, record)
        return played


def _with_prediction(played: Played, record: Explanation) -> Played:
    """Of the last placement, which is the one that spoke."""
    if not (record.placements and record.placements[-1].HasField("predicted") and record.HasField("outcome")):
        return played
    if not record.outcome.HasField("ttft_seconds"):
        return played
    return replace(
        played,
        predicted_ttft_seconds=record.placements[-1].predicted.ttft_seconds,
        placed_ttft_seconds=record.outcome.ttft_seconds,
    )
