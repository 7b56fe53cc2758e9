"""Which process that starts is frozen, and which is only slow."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, TypeVar

import pytest

from cluster.pools.watch import progress_of, wait_start
from diptych.errors import WorkerLost
from tests.cluster.pools.small_ray import SkippingLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")
PATIENCE_SECONDS = 10.0


def played(what: Coroutine[None, None, T], monkeypatch: pytest.MonkeyPatch) -> tuple[T, float]:
    """What it returns, and after how many seconds of a clock that skips."""

    async def main() -> tuple[T, float]:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(time, "monotonic", loop.time)
        return await what, loop.time()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(main())


async def start(seconds: float, answers: Iterator[bool], progress: Callable[[int], object] | None) -> str:
    async def pid_of() -> int:
        if not next(answers):
            await asyncio.Event().wait()
        return 1

    async def load() -> str:
        await asyncio.sleep(seconds)
        return "up"

    return await wait_start(asyncio.ensure_future(load()), pid_of, PATIENCE_SECONDS, progress)


def test_who_answers_may_load_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for progress in (None, lambda _: 0):
        assert played(start(590.0, itertools.repeat(True), progress), monkeypatch)[0] == "up"


def test_who_computes_or_reads_is_not_frozen_though_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that loads holds the interpreter's lock, and on a busy machine it may be let run now and then only."""
    moves = itertools.count()
    answers = itertools.chain([True], itertools.repeat(False))
    assert played(start(590.0, answers, lambda _: next(moves) // 5), monkeypatch)[0] == "up"


@pytest.mark.parametrize(("seen", "patiences"), [(True, 8), (False, 19)])
def test_who_does_neither_is_given_up(monkeypatch: pytest.MonkeyPatch, seen: bool, patiences: int) -> None:
    async def given_up() -> None:
        with pytest.raises(WorkerLost, match="its process is frozen"):
            await start(590.0, itertools.chain([True], itertools.repeat(False)), (lambda _: 0) if seen else None)

    assert played(given_up(), monkeypatch)[1] <= patiences * PATIENCE_SECONDS


def test_a_silence_now_and_then_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = itertools.cycle([True] + 5 * [False])
    assert played(start(590.0, answers, lambda _: 0), monkeypatch)[0] == "up"


def test_a_stopped_process_makes_no_progress_and_a_running_one_does() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            first = progress_of(process.pid)
            end = time.monotonic() + 60
            while progress_of(process.pid) == first:
                assert time.monotonic() < end, "it was never let run"
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            stopped = progress_of(process.pid)
            assert stopped is not None
            time.sleep(0.2)
            assert progress_of(process.pid) == stopped
        finally:
            process.kill()
    assert progress_of(process.pid) is None
