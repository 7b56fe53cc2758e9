"""Workers in processes of their own, which a test may kill, stop and start again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from diptych.types import FrontId, Placement, Request, WorkerId, WorkerSpec
from tests.workers.conftest import Front, Token
from tests.workers.crashes.line import Line
from tests.workers.crashes.worker_process import COPY_VARIABLE, NAMESPACE_VARIABLE, Footprint, Look, serve
from workers.transfer.fail_points import VARIABLE

ROOT = Path(__file__).parents[3]
START_SECONDS = 60.0
TEST_SECONDS = 120.0
STOP_SECONDS = 20.0
FRONT = FrontId("front")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServerContext]:
    """It has loaded torch: a worker starts in a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.workers.crashes.worker_process"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'proto'}")
        warm = context.Process(target=os.getpid)
        warm.start()
        warm.join()
        yield context


@dataclass(eq=False)
class Member:
    """A worker process, as a test and its peers reach it."""

    spec: WorkerSpec
    process: BaseProcess
    path: str
    line: Line
    reading: asyncio.Task[None] | None = None

    @property
    def id(self) -> WorkerId:
        return self.spec.id

    async def look(self) -> Look:
        return await asyncio.wait_for(self.line.look(), TEST_SECONDS)

    async def footprint(self) -> Footprint:
        return await asyncio.wait_for(self.line.footprint(), TEST_SECONDS)

    async def until(self, is_so: Callable[[Look], bool]) -> Look:
        async with asyncio.timeout(TEST_SECONDS):
            while not is_so(look := await self.line.look()):  # noqa: ASYNC110 (another process sets no event here)
                await asyncio.sleep(0.005)
            return look

    async def settle(self) -> Look:
        """Until nothing is under way; then every block must be spare."""
        look = await self.until(lambda look: look.idle)
        assert look.spare_blocks == look.blocks
        assert look.counters.leaked_blocks == 0
        return look

    async def wait_stopped(self) -> None:
        """Until a signal stopped it."""
        try:
            async with asyncio.timeout(STOP_SECONDS):
                while state_of(self.process) != "T":  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(f"{self.id} was not stopped: {await self.look()}") from None

    async def wait_dead(self) -> None:
        async with asyncio.timeout(TEST_SECONDS):
            while self.process.is_alive():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    async def close(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        await asyncio.to_thread(self.process.join)
        if self.reading:
            await self.reading
        await self.line.close()
        self.process.close()


@dataclass(eq=False)
class Society:
    """Members by name, and one front that reads all of them."""

    context: ForkServerContext
    spec: WorkerSpec
    folder: Path
    front: Front = field(default_factory=Front)
    members: dict[str, Member] = field(default_factory=dict)

    async def start(
        self,
        name: str,
        *,
        epoch: int = 0,
        fail_at: str = "",
        in_copy: bool = False,
        namespace: str = "",
        **changes: Any,
    ) -> Member:
        """In the place of whoever had this name; in a network of its own where `namespace` names one."""
        if before := self.members.pop(name, None):
            await before.close()
        spec = replace(self.spec, id=WorkerId(name), epoch=epoch, **changes)
        path = str(self.folder / f"{name}.{epoch}")
        ours, theirs = self.context.Pipe()
        environment = {VARIABLE: fail_at, **({COPY_VARIABLE: "1"} if in_copy else {})}
        environment |= {NAMESPACE_VARIABLE: namespace} if namespace else {}
        process = self.context.Process(target=serve, args=(spec, path, environment, theirs), daemon=True)
        process.start()
        theirs.close()
        line = Line(name, path)
        member = self.members[name] = Member(spec, process, path, line)
        assert await asyncio.to_thread(ours.poll, START_SECONDS), f"{name} did not start"
        ours.recv()
        ours.close()
        member.reading = asyncio.ensure_future(self.front.read(line, FRONT))  # type: ignore[arg-type]
        return member

    async def meet(self, member: Member, *others: Member) -> None:
        await member.line.meet({other.id: other.path for other in others})

    async def submit(self, request: Request, decode: Member, prefill: Member | None) -> Request:
        placement = Placement(
            decode=decode.id, prefill=prefill.id if prefill else None, how="remote" if prefill else "local", reason=""
        )
        await decode.line.submit(request, 0, placement)
        return request

    async def answer(self, request: Request) -> list[Token]:
        await self.front.wait_for(lambda: self.front.is_over(request.id))
        assert request.id not in self.front.failures, self.front.failures[request.id]
        return self.front.answer(request.id)

    async def close(self) -> None:
        await asyncio.gather(*(member.close() for member in self.members.values()))


def state_of(process: BaseProcess) -> str:
    with open(f"/proc/{process.pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


@pytest.fixture
def society(fork_server: ForkServerContext, spec: WorkerSpec, tmp_path: Path) -> Callable[..., Any]:
    """(**spec) → an async context with a `Society`; every process is gone after it."""

    @asynccontextmanager
    async def make(**changes: Any) -> AsyncIterator[Society]:
        society = Society(fork_server, replace(spec, **changes), tmp_path)
        try:
            yield society
            assert not society.front.contradictions
        finally:
            await society.close()

    return make


@pytest.fixture
def run_long() -> Callable[[Awaitable[None]], None]:
    """Runs a test's coroutine; none takes longer than `TEST_SECONDS`."""

    def runs(work: Awaitable[None]) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(work, TEST_SECONDS)

        asyncio.run(bounded())

    return runs
