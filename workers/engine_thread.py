"""The one thread that touches an engine: takes what others post, steps, tells what came of it.

Knows roles and reports; not Ray, and not what a post means.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from diptych.types import Counters, FrontId, KvEvent, Load, Outgoing, StepSample, Stored, TransferSample
from workers.borrowing import Borrower
from workers.decode import DecodeRole
from workers.engine.engine import Engine
from workers.engine.sequence import Sequence
from workers.lending import Lender
from workers.prefill import PrefillRole
from workers.report_pace import HEARTBEAT_SECONDS, ReportPace
from workers.samples import StepSamples, fold_steps, latest_transfers, sample_of
from workers.transfer.receiving import Receiver
from workers.transfer.sending import Sender

_LEASE_SECONDS = 0.25
"""An engine that waits for others looks at its leases this often."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a report says, but its numbering."""

    load: Load
    counters: Counters
    events: tuple[KvEvent, ...]
    full: bool
    steps: tuple[StepSample, ...] = ()
    transfers: tuple[TransferSample, ...] = ()

    def after(self, before: Snapshot) -> Snapshot:
        """One snapshot that says what the two did, when the first one was never told."""
        return replace(
            self,
            events=self.events if self.full else before.events + self.events,
            full=self.full or before.full,
            steps=fold_steps(before.steps + self.steps),
            transfers=latest_transfers(before.transfers + self.transfers),
        )


class Listener(Protocol):
    """Who hears of the engine. Called on its thread: hand over and return."""

    def step_done(self, outgoing: Mapping[FrontId, list[Outgoing]]) -> None: ...

    def changed(self, snapshot: Snapshot) -> None: ...

    def broke(self, error: BaseException) -> None:
        """A bug ended the thread: nothing will be computed any more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """An engine and both roles on it: which ones get work is the scheduler's business."""

    engine: Engine
    prefill: PrefillRole
    decode: DecodeRole
    sender: Sender
    receiver: Receiver
    lender: Lender
    borrower: Borrower

    def close(self) -> None:
        """Every wait for another worker ends."""
        self.sender.close()
        self.receiver.close()


class EngineThread:
    """`post` from anywhere; everything else happens on the thread."""

    def __init__(self, name: str, threads: int) -> None:
        self._inbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._torch_threads = threads
        self._thread = threading.Thread(target=self._main, name=f"engine-{name}", daemon=True)
        self._build: Callable[[], tuple[Roles, Listener, Callable[[], Mapping[FrontId, list[Outgoing]]]]] | None = None
        self._ready: Callable[[Roles | BaseException], None] = _nobody
        self._moved = time.monotonic()
        self._busy = False
        self._ended = False
        self._want_full = True
        self._leaked = 0
        self._steps = 0
        self._cancel_steps_max = 0
        self._samples = StepSamples()
        self._suspects: tuple[Sequence, ...] = ()
        """Whom the step under way computes."""

    def start(
        self,
        build: Callable[[], tuple[Roles, Listener, Callable[[], Mapping[FrontId, list[Outgoing]]]]],
        ready: Callable[[Roles | BaseException], None],
    ) -> None:
        """`build` makes the roles, on the thread; `ready` hears of them, or of what went wrong."""
        self._build, self._ready = build, ready
        self._thread.start()

    def post(self, what: Callable[..., None], *arguments: object) -> None:
        """Do this between two steps."""
        self._inbox.put((what, arguments))

    def post_cancel(self, what: Callable[..., None], *arguments: object) -> None:
        """As `post`; how many steps end before it is done is counted."""
        self.post(self._cancel, self._steps, what, *arguments)

    def _cancel(self, arrived_step: int, what: Callable[..., None], *arguments: object) -> None:
        what(*arguments)
        self._cancel_steps_max = max(self._cancel_steps_max, self._steps - arrived_step)

    def stop(self, timeout_seconds: float) -> bool:
        """After the step under way. Whether it stopped."""
        self._inbox.put(None)
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def request_full_report(self) -> None:
        """The next snapshot tells all, not what changed."""
        self.post(self._full_wanted)

    def _full_wanted(self) -> None:
        self._want_full = True

    def silent_seconds(self) -> float:
        """How long a busy engine has not come round; 0 when idle, for ever when it ended."""
        if self._ended:
            return float("inf")
        return time.monotonic() - self._moved if self._busy else 0.0

    # ---- the thread ---------------------------------------------------------------------------------

    def _main(self) -> None:
        # From the thread itself: set from another one, every step starts a new OpenMP team.
        torch.set_num_threads(self._torch_threads)
        assert self._build is not None
        try:
            roles, listener, take_step = self._build()
        except BaseException as error:  # the thread's last door: whoever waits for `ready` raises it
            self._ready(error)
            return
        self._ready(roles)
        try:
            self._run(roles, listener, take_step)
        except BaseException as error:  # the thread's last door: everyone hears of it
            self._ended = True
            reason = f"the engine of this worker broke: {error!r}"
            roles.decode.fail_all(reason, self._suspects)
            roles.prefill.fail_suspects(reason, self._suspects)
            listener.step_done(take_step())
            listener.broke(error)
        finally:
            self._ended = True
            roles.close()

    def _run(self, roles: Roles, listener: Listener, take_step: Callable[[], Mapping[FrontId, list[Outgoing]]]) -> None:
        engine, pace, progress, finished = roles.engine, ReportPace(), False, 0
        while (heard := self._drain(0.0 if progress else _patience_seconds(roles))) is not None:
            self._moved, self._busy = time.monotonic(), True
            roles.prefill.tick()
            roles.receiver.tick()
            roles.lender.tick()
            began = time.perf_counter()
            plan = engine.plan()
            self._suspects = plan.computing
            sample = sample_of(plan, 0.0)
            roles.decode.before_step(plan)
            roles.prefill.before_step(plan)
            result = engine.execute(plan)
            self._steps += 1
            roles.decode.after_step(result)
            roles.prefill.after_step(result)
            self._suspects = ()
            if outgoing := take_step():
                listener.step_done(outgoing)
            before, finished = finished, roles.decode.counters.finished
            load_changed = bool(heard or plan.chunks or plan.granted or plan.preempted or finished != before)
            progress = bool(plan.decodes or plan.chunks or plan.granted or plan.preempted)
            if plan.decodes or plan.chunks:
                self._samples.add(sample._replace(seconds=time.perf_counter() - began))
            now, urgent = time.monotonic(), self._want_full
            if pace.is_due(now, load_changed=load_changed, progressed=progress, urgent=urgent):
                listener.changed(self._snapshot(roles, audit=pace.settled))
            self._busy = False

    def _drain(self, wait_seconds: float) -> int | None:
        """Do what was posted, and wait for it so long when nothing is. How much, or None to stop."""
        done = 0
        try:
            item = self._inbox.get(block=wait_seconds > 0, timeout=wait_seconds or None)
            while item is not None:
                what, arguments = item
                what(*arguments)
                done += 1
                item = self._inbox.get_nowait()
        except queue.Empty:
            return done
        return None

    def _snapshot(self, roles: Roles, *, audit: bool) -> Snapshot:
        engine = roles.engine
        events = tuple(engine.pool.events())
        full, self._want_full = self._want_full, False
        if full:
            events = (Stored(engine.pool.snapshot()),)
        counters, transfers = self._counters(roles, audit=audit), latest_transfers(roles.receiver.take_samples())
        return Snapshot(engine.load(), counters, events, full, self._samples.take(), transfers)

    def _counters(self, roles: Roles, *, audit: bool) -> Counters:
        prefill, decode, engine = roles.prefill.counters, roles.decode.counters, roles.engine
        if audit:
            engine.pool.check()
            known = set[str]().union(
                *(each.owners() for each in (roles.prefill, roles.decode, roles.lender, roles.borrower))
            )
            strangers = [owner for owner in engine.pool.owners() if owner not in known]
            self._leaked = sum(len(engine.pool.blocks_of(owner)) for owner in strangers)
        return replace(
            engine.counters(),
            requests_finished=decode.finished,
            requests_cancelled=decode.cancelled + prefill.cancelled,
            blocks_sent=roles.sender.counters.blocks,
            bytes_sent=roles.sender.counters.nbytes,
            blocks_received=roles.receiver.counters.blocks,
            bytes_received=roles.receiver.counters.nbytes,
            transfers_committed=decode.committed,
            transfers_failed=decode.failed + prefill.failed,
            leaked_blocks=self._leaked,
            engine_cpu_seconds=time.thread_time(),
            cancel_steps_max=self._cancel_steps_max,
        )


def _patience_seconds(roles: Roles) -> float:
    """How long nothing but a post needs the engine. A wake costs a quarter of a millisecond of CPU."""
    leased = roles.prefill.owners() or roles.decode.owners() or roles.engine.pool.owners()
    return _LEASE_SECONDS if leased else HEARTBEAT_SECONDS


def _nobody(_: Roles | BaseException) -> None:
    """Nobody waits."""
