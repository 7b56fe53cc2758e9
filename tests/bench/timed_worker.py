"""A worker process that notes when steps, receives and landings begin and end. Changes nothing of what they do,
but for a wire that `RATE_VARIABLE` makes slower."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from diptych.types import WorkerSpec
from tests.workers.crashes import worker_process
from workers.engine.engine import Engine
from workers.transfer.link import PairLink
from workers.transfer.read_link import ReadLink
from workers.transfer.receiving import Receiver

RATE_FILE = "DIPTYCH_BENCH_RATE_FILE"
"""Names a file with the wire's bytes per second; 0 is as fast as it goes."""


@dataclass(frozen=True, slots=True)
class Noted:
    what: str
    begun: float
    ended: float
    """Monotonic seconds, the same clock in all processes."""
    cpu_seconds: float
    thread: int
    size: int
    """Prompt tokens of a step, bytes of a receive."""
    decodes: int = 0


_notes: list[Noted] = []


def serve(spec: WorkerSpec, path: str, environment: dict[str, str], ready: Connection) -> None:
    """As `worker_process.serve`."""
    _note(Engine, "execute", "step", lambda plan: (sum(work.count for work in plan.chunks), len(plan.decodes)))
    _note(Engine, "join", "join", lambda *_: (0, 0))
    _note(Receiver, "landed", "land", lambda parcel, _: (parcel.nbytes, 0))
    for link in (PairLink, ReadLink):
        _throttle(link)
        _note(link, "receive", "receive", lambda parcel: (parcel.nbytes, 0))

    async def take_notes(_: Any) -> list[Noted]:
        taken = list(_notes)
        _notes.clear()
        return taken

    worker_process._Process.take_notes = take_notes  # type: ignore[attr-defined]
    worker_process.serve(spec, path, environment, ready)


def _note(owner: type, name: str, what: str, size: Callable[..., tuple[int, int]]) -> None:
    method = getattr(owner, name)

    def noting(self: Any, *arguments: Any) -> Any:
        begun, cpu = time.monotonic(), time.thread_time()
        try:
            return method(self, *arguments)
        finally:
            cpu = time.thread_time() - cpu
            _notes.append(Noted(what, begun, time.monotonic(), cpu, threading.get_ident(), *size(*arguments)))

    setattr(owner, name, noting)


def _throttle(link: type) -> None:
    receive = link.receive  # type: ignore[attr-defined]

    def slower(self: Any, parcel: Any) -> Any:
        begun = time.monotonic()
        packed = receive(self, parcel)
        with open(os.environ[RATE_FILE]) as file:
            rate = float(file.read())
        if rate:
            time.sleep(max(0.0, parcel.nbytes / rate - (time.monotonic() - begun)))
        return packed

    link.receive = slower  # type: ignore[attr-defined]
