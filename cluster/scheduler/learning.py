"""What reports and outcomes teach, written into the fleet's columns. Knows no placement rule and no clock."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from cluster.scheduler.fleet import FAR, NEAR, Fleet
from cluster.scheduler.rates import (
    EXPOSED_PRIOR,
    STEP_PRIOR,
    TRANSFER_PRIOR,
    Residual,
    Shared,
    exposed_features,
    step_features,
    transfer_features,
)
from diptych.types import StepSample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.scheduler.view import WorkerView
    from diptych.types import How, Outcome, Prediction, Report, RequestId, TransferSample, WorkerId

_MOST_EXPECTED = 1 << 16
"""Placements whose outcome is awaited; a front that died never tells."""
_ALIKE = 0.1
"""A worker whose steps differ by less than that part from its kind's counts as it is."""
_STEP_TOKENS = 512.0
"""Of the steps that are compared, where no step was seen to be shorter."""
_ANSWER_PRIOR = 256.0
"""Tokens, until the first outcome."""


class Learning:
    """One cluster's. Kinds of workers are their devices; kinds of pairs are near and far."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._slots: dict[WorkerId, tuple[int, str]] = {}
        self._steps: Shared[WorkerId] = Shared(np.array(STEP_PRIOR))
        self._transfers: Shared[tuple[WorkerId, int]] = Shared(np.array(TRANSFER_PRIOR))
        self._exposed: Shared[tuple[WorkerId, int]] = Shared(np.array(EXPOSED_PRIOR))
        self._residuals: dict[How, Residual] = {"remote": Residual(), "local": Residual(), "mixed": Residual()}
        self._late: Mapping[How, float] = dict.fromkeys(self._residuals, 0.0)
        self._expected: OrderedDict[RequestId, tuple[How, float]] = OrderedDict()
        self._answer_tokens: float | None = None

    # ---- workers -----------------------------------------------------------------------------------

    def join(self, worker: WorkerId, slot: int, device: str) -> None:
        """It starts from the mean of its kind."""
        self._slots[worker] = slot, device
        self._write_steps(worker)
        for kind in (NEAR, FAR):
            self._write_links(worker, kind)

    def leave(self, worker: WorkerId) -> None:
        """Its kind keeps what it taught."""
        del self._slots[worker]
        self._steps.forget(worker)
        for kind in (NEAR, FAR):
            self._transfers.forget((worker, kind))
            self._exposed.forget((worker, kind))

    def reported(self, report: Report, hosts: Mapping[WorkerId, float], implied: StepSample | None) -> None:
        """Its steps and the transfers to it; `hosts` numbers the hosts of those who may have sent them.

        `implied`: what its steps took by its counters, if it didn't measure them.
        """
        if steps := report.steps or ((implied,) if implied else ()):
            self._learn_steps(report.worker, steps, bounded=not implied)
        for kind in (NEAR, FAR) if report.transfers else ():
            here = hosts[report.worker]
            told = [one for one in report.transfers if one.sender in hosts]
            told = [one for one in told if (NEAR if hosts[one.sender] == here else FAR) == kind]
            if told:
                self._learn_transfers(report.worker, kind, told)

    def _learn_steps(self, worker: WorkerId, samples: tuple[StepSample, ...], *, bounded: bool) -> None:
        slot, device = self._slots[worker]
        kind_moved = self._steps.learn(worker, device, [step_features(one) for one in samples if one.seconds > 0])
        if bounded:
            self._fleet.saw_step(slot, max(one.prompt_tokens for one in samples))
        for other in self._slots if kind_moved else (worker,):
            if other == worker or other not in self._steps:
                self._write_steps(other)
        if kind_moved:
            self._write_kind([slot for slot, kind in self._slots.values() if kind == device], device)

    def _learn_transfers(self, worker: WorkerId, kind: int, samples: list[TransferSample]) -> None:
        samples = [one for one in samples if one.seconds > 0]
        moved = self._transfers.learn((worker, kind), str(kind), [transfer_features(one) for one in samples])
        self._exposed.learn((worker, kind), str(kind), [exposed_features(one) for one in samples])
        for other in self._slots if moved else (worker,):
            if other == worker or (other, kind) not in self._transfers:
                self._write_links(other, kind)

    def _write_steps(self, worker: WorkerId) -> None:
        slot, device = self._slots[worker]
        fleet, rates = self._fleet, self._steps.of(worker, device)
        columns = (
            fleet.step_seconds,
            fleet.token_seconds,
            fleet.pair_seconds,
            fleet.row_seconds,
            fleet.context_seconds,
        )
        for column, rate in zip(columns, rates, strict=True):
            column[slot] = rate
        fleet.rates_changed(slot)
        self._write_kind([slot], device)

    def _write_kind(self, slots: Sequence[int], device: str) -> None:
        """At what pace work of these workers, which are of one kind, counts."""
        fleet, (step, token, pair, *_) = self._fleet, self._steps.mean(device)
        own = fleet.step_seconds[slots], fleet.token_seconds[slots], fleet.pair_seconds[slots]
        tokens = np.minimum(fleet.step_tokens[slots], _STEP_TOKENS)
        theirs = step + tokens * (token + pair * 0.5 * tokens)
        alike = np.abs(own[0] + tokens * (own[1] + own[2] * 0.5 * tokens) - theirs) <= _ALIKE * theirs
        columns = fleet.kind_step_seconds, fleet.kind_token_seconds, fleet.kind_pair_seconds
        for column, mine, mean in zip(columns, own, (step, token, pair), strict=True):
            column[slots] = np.where(alike, mine, mean)

    def _write_links(self, worker: WorkerId, kind: int) -> None:
        slot, _ = self._slots[worker]
        fleet, key = self._fleet, (worker, kind)
        nbytes = fleet.token_bytes[slot]
        fleet.fetch_seconds[kind, slot], byte_seconds = self._transfers.of(key, str(kind))
        fleet.fetch_token_seconds[kind, slot] = nbytes * byte_seconds
        fleet.exposed_seconds[kind, slot], byte_seconds = self._exposed.of(key, str(kind))
        fleet.exposed_token_seconds[kind, slot] = nbytes * byte_seconds
        fleet.links_changed()

    # ---- requests ----------------------------------------------------------------------------------

    @property
    def late_seconds(self) -> Mapping[How, float]:
        """By how much first tokens of each way come later than predicted without it; replaced, never changed."""
        return self._late

    def answer_tokens(self, max_tokens: int) -> float:
        """How long an answer becomes, on average."""
        return max(1.0, min(float(max_tokens), _ANSWER_PRIOR if self._answer_tokens is None else self._answer_tokens))

    def expect(self, request: RequestId, how: How, predicted: Prediction) -> None:
        """Its outcome will be held against this."""
        self._expected[request] = how, predicted.ttft_seconds - self._late[how]
        if len(self._expected) > _MOST_EXPECTED:
            self._expected.popitem(last=False)

    def finished(self, outcome: Outcome) -> None:
        """Once per request; of one that isn't known nothing is learned."""
        expected = self._expected.pop(outcome.request, None)
        if expected is None or outcome.error:
            return
        how, ttft_seconds = expected
        known = self._answer_tokens
        self._answer_tokens = outcome.tokens if known is None else known + 0.02 * (outcome.tokens - known)
        if outcome.ttft_seconds is not None and (outcome.served is None or outcome.served.how == how):
            self._residuals[how].learn(outcome.ttft_seconds, ttft_seconds)
            self._late = {how: residual.seconds for how, residual in self._residuals.items()}


def implied_step(before: WorkerView, report: Report, at: float) -> StepSample | None:
    """What a busy worker's steps took between two reports: of workers that don't measure them."""
    load, old, new = before.load, before.counters, report.counters
    steps, tokens = new.steps - old.steps, new.prompt_tokens_computed - old.prompt_tokens_computed
    if report.steps or before.number is None or tokens <= 0 or not load.waiting_tokens or at <= before.heard:
        return None
    steps = max(1, steps)
    rows = (new.decode_rows - old.decode_rows) / steps
    context = rows * report.load.blocks_held * before.info.layout.block_size / max(1, report.load.running_requests)
    return StepSample(steps, tokens / steps, 0.0, rows, context, (at - before.heard) / steps)
