"""How a process of the cluster ends, and how often one may. Knows handles, not what they do."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import psutil
import ray

from diptych.errors import ServingError, WorkerLost
from workers.actors import answer

T = TypeVar("T")
_FORGOTTEN_SECONDS = 600.0
_LOOKS = 6
"""In a row, each of a patience, at which a process that starts neither answered nor moved: then it is frozen."""
_BLIND_LOOKS = 18
"""As above, of a process on another machine. A library that is loaded over a network may keep it from answering."""


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


async def wait_start(
    starting: asyncio.Future[T],
    pid_of: Callable[[], Awaitable[int]],
    patience_seconds: float,
    progress: Callable[[int], object] | None,
) -> T:
    """Until it has started. Raises WorkerLost when its process is frozen, and what `starting` raises.

    Loading may take long, and the interpreter's lock may be held all the while: a process that does not answer is
    given up only when it made no progress either, or, where nobody here can see that, when it is silent for longer.
    """
    looks, silent, pid, before = _LOOKS if progress else _BLIND_LOOKS, 0, 0, object()
    began = time.monotonic()
    try:
        while silent < looks:
            await asyncio.wait({starting}, timeout=patience_seconds / 2)
            if starting.done():
                return starting.result()
            try:
                pid = await asyncio.wait_for(pid_of(), patience_seconds / 2)
                silent, began = 0, time.monotonic()
            except ServingError:
                continue  # it is dying, and says so in a moment
            except TimeoutError:
                now = progress(pid) if progress and pid else before
                silent, before = (silent + 1 if now == before else 0), now
    finally:
        starting.cancel()
    seconds = time.monotonic() - began
    raise WorkerLost(f"its process is frozen: while it started, nothing was heard of it for {seconds:.0f} s")


def progress_of(pid: int) -> object:
    """What a process of this machine has computed and read so far: equal to the last only when it did neither."""
    try:
        process = psutil.Process(pid)
        return process.cpu_times()[:2], process.io_counters()
    except psutil.Error:
        return None


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
