"""One virtual worker: the real batcher over the real block pool, and steps that take what the rates say.

Knows no peer, link or scheduler: a `Listener` hears of what happens here. Steps that only decode are taken in leaps,
as far as nothing changes; whatever arrives meanwhile takes effect when the step under way ends, as on a real worker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

from cluster.simulate.rates import Leap, StepRates, sample_of
from cluster.simulate.reporting import Reporting
from diptych.types import Load
from workers.engine.batching import Batcher, StepPlan
from workers.engine.blocks import BlockPool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.simulate.asked import VirtualSequence
    from cluster.simulate.clock import Clock, Planned
    from cluster.simulate.constants import Constants
    from diptych.types import Report, Role, TransferSample, WorkerInfo
    from workers.engine.sequence import Sequence


class Listener(Protocol):
    """Who made the workers."""

    def granted(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        """A hand-off to here has its room."""

    def admitted(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        """A prompt begins to be computed here."""

    def computed(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        """Part of a prompt, perhaps its last."""

    def finished(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        """It has all its tokens."""

    def reported(self, worker: VirtualWorker, report: Report) -> None:
        """It told the scheduler."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What is computed now; `leap.steps` of it."""

    plan: StepPlan
    leap: Leap
    started: float
    rows: int
    context: int


class VirtualWorker:
    """Alive until `die`."""

    def __init__(self, info: WorkerInfo, constants: Constants, clock: Clock, listener: Listener) -> None:
        self.info = info
        self.id = info.id
        self.alive = True
        self.pool = BlockPool(info.blocks, eviction=constants.eviction)
        self.tokens_emitted = 0
        self.busy_seconds = 0.0
        self._constants = constants
        self._ends_answers = False
        """A prefill worker that decoded before, and still does."""
        self._batcher = Batcher(
            self.pool,
            block_size=info.layout.block_size,
            max_batch_tokens=constants.prefill_chunk_tokens,
            max_running=constants.max_decode_batch,
        )
        self._limit_steps()
        self._rates = StepRates(constants)
        self._clock = clock
        self._listener = listener
        self._reporting = Reporting(info, self)
        self._step: _Step | None = None
        self._planned: Planned | None = None
        self._heard = False
        self._dropped: list[Sequence] = []
        """While they are computed."""

    # ---- what others ask ------------------------------------------------------------------------

    def set_role(self, role: Role) -> None:
        """What it does from now on; what it has begun it ends."""
        self.info = replace(self.info, role=role)
        self._limit_steps()
        self.wake()

    def add(self, sequence: Sequence) -> None:
        """Queue it."""
        self._batcher.add(sequence)
        self.wake()

    def join(self, sequence: Sequence) -> None:
        """Its prompt's KV is here: it decodes from its first token on."""
        if self.pool.kind(sequence.ticket):
            self.pool.commit(sequence.ticket, sequence.owner)
        sequence.computed = sequence.prompt_length
        self._name_full_blocks(sequence)
        sequence.tokens.append(0)
        self._batcher.join(sequence)
        self.wake()

    def leave(self, sequence: Sequence) -> None:
        """It computes no more here; its blocks stay its own."""
        self._batcher.remove(sequence)

    def drop(self, sequence: Sequence) -> None:
        """It is over here: every block it holds is given back, when the step that computes it ends."""
        if self._step and sequence in self._step.plan.computing:
            self._dropped.append(sequence)
        else:
            self._forget(sequence)
        self.wake()

    def _forget(self, sequence: Sequence) -> None:
        self._batcher.remove(sequence)
        self.pool.release(sequence.ticket)
        self.pool.release(sequence.owner)

    def wake(self) -> None:
        """Something changed: plan anew when the step under way ends, or now."""
        self._heard = True
        if not self.alive:
            return
        if self._planned is None:
            self._planned = self._clock.after(0.0, self._begin)
        elif self._step and self._step.leap.steps > 1:
            self._shorten(self._step)

    def beat(self) -> None:
        """Time passed: what is due to be told is told."""
        if self.alive and self._step is None:
            self._tell(progressed=False)

    def landed(self, sample: TransferSample) -> None:
        """A hand-off came in."""
        self._reporting.landed(sample)

    def tell_all(self) -> None:
        """The scheduler asked for a full report."""
        self._reporting.wants_full = True

    def die(self) -> tuple[VirtualSequence, ...]:
        """At once; what it computed by now counts. Who decoded here."""
        if self._step and self._step.leap.steps > 1:
            done = self._step.leap.steps_begun(self._clock.now - self._step.started) - 1
            self._advance_decodes(self._step.plan.decodes, done)
        self.alive = False
        self._step = None
        if self._planned:
            self._planned.cancel()
        return tuple(cast("VirtualSequence", sequence) for sequence in self._batcher.running)

    # ---- what it says of itself -------------------------------------------------------------------

    @property
    def prompt_tokens_waiting(self) -> int:
        """Not computed yet."""
        return _remaining(self._batcher.waiting) + _remaining(self._batcher.running)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._batcher.running)

    def load(self) -> Load:
        """As the real engine's."""
        pool = self.pool
        return Load(
            waiting_requests=len(self._batcher.waiting),
            waiting_tokens=self.prompt_tokens_waiting,
            running_requests=self.running,
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_held=pool.held,
            blocks_granted=pool.granted,
            blocks_lent=pool.lent,
        )

    def check(self) -> None:
        """Blocks are whole, and nobody holds any when nothing is left to do."""
        self.pool.check()
        assert self._batcher.has_work or not self.pool.owners(), f"{self.id}: {self.pool.owners()} hold blocks"

    # ---- a step -------------------------------------------------------------------------------------

    def _limit_steps(self) -> None:
        """By its role; a prefill worker that has answers left from before has smaller steps until they end."""
        alone = self.info.role == "prefill"
        self._ends_answers = alone and any(sequence.task != "prefill" for sequence in self._batcher.running)
        told = self._constants
        self._batcher.limit(told.prefill_chunk_tokens if alone and not self._ends_answers else told.decode_chunk_tokens)

    def _begin(self) -> None:
        if self._ends_answers:
            self._limit_steps()
        plan = self._batcher.plan()
        while plan.preempted and not plan.computing:
            plan = self._batcher.plan()
        self._planned = None
        changed = self._heard or bool(plan.chunks or plan.granted or plan.preempted)
        self._reporting.load_changed |= changed
        self._heard = False
        if plan.computing:
            self._start(plan)
        for sequence in plan.granted:
            self._listener.granted(self, cast("VirtualSequence", sequence))
        for sequence in plan.admitted:
            self._listener.admitted(self, cast("VirtualSequence", sequence))
        if self._step is None:
            self._tell(progressed=bool(plan.granted or plan.preempted))

    def _start(self, plan: StepPlan) -> None:
        rows = len(plan.decodes)
        context = sum([len(sequence.tokens) for sequence in plan.decodes])
        if plan.chunks:
            leap = Leap(1, self._rates.mixed_seconds(plan.chunks, rows, context), 0.0)
        else:
            leap = self._rates.leap(self._steps_alike(plan.decodes), rows, context)
        self._step = _Step(plan, leap, self._clock.now, rows, context)
        self._planned = self._clock.after(leap.seconds(leap.steps), self._end)

    def _steps_alike(self, decodes: Iterable[Sequence]) -> int:
        """Until one of them ends, speaks for the first time or needs another block."""
        size = self.info.layout.block_size
        return min(
            min(
                sequence.request.params.max_tokens - sequence.generated if sequence.generated else 1,
                len(sequence.blocks) * size - len(sequence.tokens) + 1,
            )
            for sequence in decodes
        )

    def _shorten(self, step: _Step) -> None:
        steps = step.leap.steps_begun(self._clock.now - step.started)
        if steps == step.leap.steps:
            return
        assert self._planned is not None, "a step has its end"
        self._planned.cancel()
        leap = step.leap._replace(steps=steps)
        self._step = _Step(step.plan, leap, step.started, step.rows, step.context)
        self._planned = self._clock.at(step.started + leap.seconds(steps), self._end)

    def _end(self) -> None:
        step, self._step, self._planned = self._step, None, None
        assert step is not None, "a step ended that didn't begin"
        plan, steps = step.plan, step.leap.steps
        seconds = step.leap.seconds(steps)
        self.busy_seconds += seconds
        self._reporting.add(sample_of(steps, seconds, plan.chunks, step.rows, step.context))
        dropped, self._dropped = self._dropped, []
        for sequence in dropped:
            self._forget(sequence)
        decodes = [sequence for sequence in plan.decodes if sequence not in dropped]
        first = [sequence for sequence in decodes if not sequence.generated]
        ended = self._advance_decodes(decodes, steps)
        for sequence in first:
            self._listener.computed(self, cast("VirtualSequence", sequence))
        for work in plan.chunks:
            sequence = work.sequence
            if sequence in dropped:
                continue
            sequence.computed += work.count
            self._name_full_blocks(sequence)
            if sequence.remaining == 0:
                sequence.tokens.append(0)
                self.tokens_emitted += 1
            self._listener.computed(self, cast("VirtualSequence", sequence))
        for sequence in ended:
            self._listener.finished(self, cast("VirtualSequence", sequence))
        self._reporting.load_changed |= bool(plan.chunks or ended)
        self._tell(progressed=True)
        if self.alive and self._planned is None:
            self._begin()

    def _advance_decodes(self, decodes: Iterable[Sequence], steps: int) -> list[Sequence]:
        """Those that have all their tokens now."""
        ended: list[Sequence] = []
        new = [0] * steps
        for sequence in decodes:
            sequence.computed += steps
            sequence.tokens += new
            self._name_full_blocks(sequence)
            self.tokens_emitted += steps
            if sequence.generated >= sequence.request.params.max_tokens:
                ended.append(sequence)
        return ended

    def _name_full_blocks(self, sequence: Sequence) -> None:
        full = sequence.full_blocks
        if full > sequence.named:
            names = sequence.names()
            for block in range(sequence.named, full):
                self.pool.name(sequence.blocks[block], names[block], sequence.owner)
            sequence.named = full

    def _tell(self, *, progressed: bool) -> None:
        report = self._reporting.due(self._clock.now, progressed=progressed)
        if report:
            self._listener.reported(self, report)


def _remaining(sequences: Iterable[Sequence]) -> int:
    return sum([each.remaining for each in sequences if each.task != "decode" and each.remaining > 1])
