"""A worker in a process of its own, reached over a Unix socket. Knows no Ray and no test."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from diptych.types import Counters, FrontId, KvSource, WorkerId, WorkerSpec
from tests.workers.crashes.line import Line, answer
from workers.engine_thread import Roles
from workers.transfer import shared_arena
from workers.transfer.link import PairLink
from workers.transfer.states import State, Transfer
from workers.worker import Worker

_PR_SET_PDEATHSIG = 1
COPY_VARIABLE = "DIPTYCH_TEST_STOP_IN_COPY"
"""In its environment: it stops itself, once, in the middle of moving a parcel."""
NAMESPACE_VARIABLE = "DIPTYCH_TEST_NAMESPACE"
"""In its environment: the network namespace that it lives in."""
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A worker between two steps."""

    counters: Counters
    sender: dict[tuple[str, str], int]
    """Transitions."""
    receiver: dict[tuple[str, str], int]
    ends: tuple[str, ...]
    """Hand-offs that ended here without a commit, and why."""
    handing: frozenset[str]
    """Requests whose hand-off is under way."""
    idle: bool
    spare_blocks: int
    """Free or cached."""
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a process holds."""

    rss_bytes: int
    files: int
    arenas: int
    """Mappings of KV memory."""
    threads: int
    """Of links and doors; the event loop's helpers come and stay as they are needed."""


def serve(spec: WorkerSpec, path: str, environment: dict[str, str], ready: Connection) -> None:
    """Until it is killed; also when what started it dies. Says to `ready` that its socket is there."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(environment)
    if NAMESPACE_VARIABLE in environment:
        enter(environment[NAMESPACE_VARIABLE])
    if COPY_VARIABLE in environment:
        _stop_in_copy()
    torch.set_num_threads(1)
    asyncio.run(_serve(spec, path, ready))


def enter(namespace: str) -> None:
    """This thread's sockets, and those of threads it starts, are there from now on. (`os.setns` comes with 3.12.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter the network namespace {namespace}")


async def _serve(spec: WorkerSpec, path: str, ready: Connection) -> None:
    await _Process(spec).serve(path, ready)


class _Process:
    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = Worker(spec)
        self._ends: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._lines: dict[WorkerId, tuple[str, Line]] = {}

    async def serve(self, path: str, ready: Connection) -> None:
        self._note_ends()
        await self._worker.start()
        self._server = await asyncio.start_unix_server(lambda *ends: answer(self, *ends, self._tasks), path)
        ready.send(os.getpid())
        traceback.print_exception(await self._worker.wait_broken())
        sys.stderr.flush()
        os._exit(1)

    def _note_ends(self) -> None:
        end = Transfer.end

        def noted(transfer: Transfer, how: State, reason: str = "") -> bool:
            before = transfer.state
            if is_end := end(transfer, how, reason):
                self._ends.append(f"{transfer.id} {before.value} > {how.value}: {reason}")
            return is_end

        Transfer.end = noted  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    async def meet(self, peers: dict[WorkerId, str]) -> None:
        """Their sockets."""
        for worker, (path, line) in list(self._lines.items()):
            if peers.get(worker) != path:
                del self._lines[worker]
                await line.close()
        for worker, path in peers.items():
            if worker not in self._lines:
                self._lines[worker] = (path, Line(worker, path))
        await self._worker.meet({worker: line for worker, (_, line) in self._lines.items()})  # type: ignore[misc]

    def outbox(self, front: FrontId) -> AsyncGenerator[Any, None]:
        return self._worker.outbox(front)

    async def look(self) -> Look:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Look] = loop.create_future()

        def look() -> None:
            loop.call_soon_threadsafe(future.set_result, _look(self._worker, self._ends))

        self._worker._engine.post(look)
        return await future

    async def footprint(self) -> Footprint:
        return _footprint()


def _stop_in_copy() -> None:
    """Over gloo a sender that has begun to send, over a mapping a reader that has copied half."""
    open_gloo, read = PairLink._open_gloo, shared_arena.read_granules

    def open_stopping(link: PairLink, store: Any) -> None:
        open_gloo(link, store)
        group: Any = link._group
        link._group = _StopsInSend(group)
        for end in link._sockets:  # a parcel leaves in many pieces
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def read_stopping(arena: Tensor, source: KvSource, count: int, out: Tensor | None = None) -> Tensor:
        del out
        half = count // 2
        first = read(arena, source, half)
        stop_once()
        rest = read(arena, replace(source, skip=source.skip + half), count - half)
        return torch.cat([first, rest])

    PairLink._open_gloo = open_stopping  # type: ignore[method-assign]
    shared_arena.read_granules = read_stopping


class _StopsInSend:
    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, *arguments: Any) -> Any:
        work = self._group.send(*arguments)
        stop_once()
        return work


_stops = itertools.count()


def stop_once() -> None:
    if not next(_stops):
        os.kill(os.getpid(), signal.SIGSTOP)


def _footprint() -> Footprint:
    gc.collect()
    with open("/proc/self/maps") as maps:
        arenas = sum("diptych-kv" in line for line in maps)
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return Footprint(
        rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        files=len(os.listdir("/proc/self/fd")),
        arenas=arenas,
        threads=sum(thread.name.startswith(("send-", "receive-", "kv-")) for thread in threading.enumerate()),
    )


def _look(worker: Worker, ends: list[str]) -> Look:
    roles: Roles = worker._roles
    pool, decode, prefill = roles.engine.pool, roles.decode, roles.prefill
    pool.check()
    return Look(
        counters=worker._engine._counters(roles, audit=True),
        sender=_named(prefill.counters.tally.transitions),
        receiver=_named(decode.counters.tally.transitions),
        ends=tuple(ends),
        handing=frozenset(
            request
            for request, _ in (*prefill._jobs, *(key for key, answer in decode._answers.items() if answer.handoff))
        ),
        idle=not (
            decode._answers
            or decode._by_sequence
            or prefill._jobs
            or prefill._by_sequence
            or roles.receiver._inbound
            or roles.sender._outbound
            or pool.owners()
            or roles.engine.has_work
            or roles.engine.batcher.granted
        ),
        spare_blocks=pool.free + pool.cached,
        blocks=roles.engine.limits.blocks,
    )


def _named(transitions: Any) -> dict[tuple[str, str], int]:
    return {(before.value, after.value): count for (before, after), count in transitions.items()}
