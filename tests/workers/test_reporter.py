"""Reports are numbered, in order, and a lost one is made good by a full one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from diptych.errors import WorkerLost
from diptych.types import BlockHash, Counters, Load, Report, Stored, WorkerId
from workers.engine_thread import Snapshot
from workers.reporter import Reporter

Make = Callable[..., Any]


def snapshot(name: str, *, full: bool = False) -> Snapshot:
    return Snapshot(Load(blocks_free=ord(name)), Counters(), (Stored((BlockHash(name.encode()),)),), full)


def told(report: Report) -> tuple[int, str, bool]:
    names = b"".join(name for event in report.events for name in event.hashes).decode()
    return report.number, names, report.full


class Scheduler:
    """Answers each report as the test says, when it says."""

    def __init__(self) -> None:
        self.reports: asyncio.Queue[tuple[Report, asyncio.Future[bool]]] = asyncio.Queue()

    async def report(self, report: Report) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.reports.put_nowait((report, answer))
        return await answer


@pytest.fixture
def reporting(run: Make) -> Make:
    def make(test: Callable[[Reporter, Scheduler, list[int]], Any]) -> None:
        async def runs() -> None:
            wanted: list[int] = []
            reporter = Reporter(WorkerId("w"), 3, lambda: wanted.append(1))
            scheduler = Scheduler()
            reporter.report_to(scheduler.report)
            assert len(wanted) == 1  # a new scheduler knows nothing
            await test(reporter, scheduler, wanted)
            reporter.close()

        run(runs())

    return make


def test_what_happens_while_a_report_is_on_its_way_is_one_report(reporting: Make) -> None:
    async def test(reporter: Reporter, scheduler: Scheduler, wanted: list[int]) -> None:
        reporter.add(snapshot("a", full=True))
        report, answer = await scheduler.reports.get()
        assert (told(report), report.epoch) == ((0, "a", True), 3)
        reporter.add(snapshot("b"))
        reporter.add(snapshot("c"))
        answer.set_result(False)
        report, answer = await scheduler.reports.get()
        assert (told(report), report.load.blocks_free) == ((1, "bc", False), ord("c"))
        answer.set_result(False)
        assert len(wanted) == 1

    reporting(test)


@pytest.mark.parametrize("failed", [TimeoutError(), WorkerLost("the scheduler died")])
def test_a_report_that_may_be_lost_is_followed_by_a_full_one(reporting: Make, failed: Exception) -> None:
    async def test(reporter: Reporter, scheduler: Scheduler, wanted: list[int]) -> None:
        reporter.add(snapshot("a"))
        _, answer = await scheduler.reports.get()
        answer.set_exception(failed)
        reporter.add(snapshot("b"))
        report, answer = await scheduler.reports.get()
        assert told(report) == (1, "b", False)  # a gap or not: the scheduler sees by the number
        assert len(wanted) == 2
        reporter.add(snapshot("c"))
        reporter.add(snapshot("z", full=True))
        answer.set_result(False)
        report, answer = await scheduler.reports.get()
        assert told(report) == (2, "z", True)
        answer.set_result(False)

    reporting(test)


def test_a_scheduler_that_has_a_gap_gets_a_full_report(reporting: Make) -> None:
    async def test(reporter: Reporter, scheduler: Scheduler, wanted: list[int]) -> None:
        reporter.add(snapshot("a"))
        _, answer = await scheduler.reports.get()
        answer.set_result(True)
        while len(wanted) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)

    reporting(test)
