"""How a process of the cluster ends, and how often one may. Knows handles, not what they do."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import ray

from diptych.errors import ServingError
from workers.actors import answer

_FORGOTTEN_SECONDS = 600.0


class Deaths:
    """Of one place in the cluster. Old ones are forgotten: a crash a day is no reason to give up."""

    def __init__(self, most: int) -> None:
        """`most` within ten minutes are made good."""
        self._most = most
        self._at: deque[float] = deque()

    def add(self, now: float) -> None:
        """`now` is monotonic seconds."""
        self._at.append(now)
        while now - self._at[0] > _FORGOTTEN_SECONDS:
            self._at.popleft()

    @property
    def too_many(self) -> bool:
        """It would die for ever."""
        return len(self._at) > self._most

    def __str__(self) -> str:
        return f"{len(self._at)} times within {_FORGOTTEN_SECONDS / 60:.0f} minutes"


async def wait_end(
    handle: Any,  # noqa: ANN401 (handles are untyped)
    who: str,
    silent_seconds: Callable[[], Awaitable[float]],
    patience_seconds: float,
    pid: int | None,
) -> str:
    """Until the process died; says how. One that is stuck for longer than `patience_seconds` is killed.

    `silent_seconds` asks the process how long it has been stuck; no answer is an answer too. `pid` is
    given for a process on this machine.
    """
    dead = asyncio.ensure_future(answer(handle.wait_dead.remote(), who))
    suspected = False
    try:
        while True:
            await asyncio.wait({dead}, timeout=patience_seconds / 2)
            if dead.done():
                return _how(dead.exception())
            stuck = await _stuck(silent_seconds, patience_seconds)
            if stuck and suspected:
                _kill(handle, pid)
                await asyncio.wait({dead}, timeout=patience_seconds)
                return f"{stuck} and was killed"
            # Twice in a row: after the whole machine was paused, everyone was silent for long, once.
            suspected = bool(stuck)
    finally:
        dead.cancel()


def _kill(handle: Any, pid: int | None) -> None:  # noqa: ANN401
    """Ray asks first, and kills a stopped process only 5 s later: so long it would keep its memory and ports."""
    if pid is None:
        ray.kill(handle)  # pyright: ignore[reportUnknownMemberType]
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def silence_of(handle: Any, who: str) -> Callable[[], Awaitable[float]]:  # noqa: ANN401
    """For a worker: its engine says how long it didn't come round."""
    return lambda: answer(handle.silent_seconds.remote(), who)


def pulse_of(handle: Any, who: str) -> Callable[[], Awaitable[float]]:  # noqa: ANN401
    """For a process that only has an event loop: it is stuck when it doesn't answer."""

    async def silent_seconds() -> float:
        await answer(handle.__ray_ready__.remote(), who)
        return 0.0

    return silent_seconds


async def end(handle: Any) -> None:  # noqa: ANN401
    """Kill it; returns when it is dead."""
    dead = handle.wait_dead.remote()
    ray.kill(handle)  # pyright: ignore[reportUnknownMemberType]
    with suppress(ServingError):
        await answer(dead, "a process")


async def _stuck(silent_seconds: Callable[[], Awaitable[float]], patience_seconds: float) -> str:
    try:
        silent = await asyncio.wait_for(silent_seconds(), patience_seconds / 2)
    except TimeoutError:
        return f"did not answer for {patience_seconds:g} s"
    except ServingError:
        return ""  # it is dying: we hear of that in a moment
    return f"did not move for {silent:.1f} s" if silent > patience_seconds else ""


def _how(error: BaseException | None) -> str:
    """Ray's paragraph on a death in a line."""
    told = str(getattr(error, "__cause__", None) or error)
    reason = re.search(r"(?:Worker exit detail:|is dead because)\s*(.+?)(?:\. |\n|$)", told)
    return f"died: {reason[1] if reason else told.splitlines()[0]}"
