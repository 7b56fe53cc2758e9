"""A virtual worker's reports: the real pace, numbered, with samples of its steps and transfers. Knows no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from diptych.types import Counters, Report, Stored
from workers.report_pace import ReportPace
from workers.samples import StepSamples, latest_transfers

if TYPE_CHECKING:
    from diptych.types import Load, StepSample, TransferSample, WorkerInfo
    from workers.engine.blocks import BlockPool


class Reported(Protocol):
    """A worker, as far as its reports go."""

    @property
    def pool(self) -> BlockPool: ...
    @property
    def tokens_emitted(self) -> int: ...
    def load(self) -> Load: ...


class Reporting:
    """Of one incarnation."""

    def __init__(self, info: WorkerInfo, worker: Reported) -> None:
        self._info = info
        self._worker = worker
        self._pace = ReportPace()
        self._number = 0
        self._steps = StepSamples()
        self._transfers: list[TransferSample] = []
        self.load_changed = True
        """Since `due` was last asked."""
        self.wants_full = False

    def add(self, sample: StepSample) -> None:
        """A step, or several alike."""
        self._steps.add(sample)

    def landed(self, sample: TransferSample) -> None:
        """A hand-off came in."""
        self._transfers.append(sample)

    def due(self, now: float, *, progressed: bool) -> Report | None:
        """Asked after each step, and when nothing was computed."""
        changed, self.load_changed = self.load_changed, False
        if not self._pace.is_due(now, load_changed=changed, progressed=progressed, urgent=self.wants_full):
            return None
        return self._report()

    def _report(self) -> Report:
        pool = self._worker.pool
        events = tuple(pool.events())
        full, self.wants_full = self.wants_full or not self._number, False
        transfers, self._transfers = latest_transfers(self._transfers), []
        report = Report(
            worker=self._info.id,
            epoch=self._info.epoch,
            number=self._number,
            load=self._worker.load(),
            counters=Counters(tokens_emitted=self._worker.tokens_emitted),
            events=(Stored(pool.snapshot()),) if full else events,
            full=full,
            steps=self._steps.take(),
            transfers=transfers,
        )
        self._number += 1
        return report
