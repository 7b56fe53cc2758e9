"""How much there is to do for each worker, read from the view and the queues. Decides nothing, changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.scheduler.needs import Pool
    from cluster.scheduler.view import ClusterView, WorkerView
    from diptych.types import WorkerId

_LEAST_SLACK = 0.1
"""Of the wished pace: where even an empty step takes nearly as long, or longer, answers can't keep it."""


class WorkerPressure(NamedTuple):
    """One worker's part of the pressure."""

    worker: WorkerId
    load: float
    """prefill: seconds of prompts to compute. decode: the share of slots, blocks or pace that is taken, the most
    of them; over 1 when more wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """The cluster at one moment."""

    at: float
    """Monotonic seconds."""
    asked_seconds: float
    """Worker-seconds of prompts asked for since the scheduler began, whether placed or waiting."""
    queued_seconds: float
    """Of them, of those that wait for a placement."""
    ttft_seconds: float
    """Wished for the first token."""
    prefill: tuple[WorkerPressure, ...]
    decode: tuple[WorkerPressure, ...]

    @property
    def waiting_seconds(self) -> float:
        """Worker-seconds of prompts that nobody has computed."""
        return self.queued_seconds + sum(worker.load for worker in self.prefill)

    @property
    def filled(self) -> float:
        """Decode workers that the answers would fill."""
        return sum(worker.load for worker in self.decode)

    def of(self, role: Pool) -> tuple[WorkerPressure, ...]:
        """Of one role."""
        return self.prefill if role == "prefill" else self.decode


def pressure(
    view: ClusterView,
    now: float,
    *,
    asked_seconds: float,
    queued_seconds: float,
    ttft_seconds: float,
    itl_seconds: float,
    max_running: int | None,
) -> Pressure:
    """See `Pressure`; `max_running`: sequences that a worker takes on."""
    return Pressure(
        at=now,
        asked_seconds=asked_seconds,
        queued_seconds=queued_seconds,
        ttft_seconds=ttft_seconds,
        prefill=tuple(
            WorkerPressure(worker.info.id, max(0.0, float(view.fleet.idle_at[-1, worker.slot]) - now))
            for worker in view.pool("prefill")
        ),
        decode=tuple(
            WorkerPressure(worker.info.id, max(_shares(view, worker, itl_seconds, max_running)))
            for worker in view.pool("decode")
        ),
    )


def _shares(view: ClusterView, worker: WorkerView, itl_seconds: float, max_running: int | None) -> Iterator[float]:
    """Of each thing that answers need."""
    fleet, slot = view.fleet, worker.slot
    yield 1.0 - max(0.0, fleet.room_tokens.item(slot)) / max(1, worker.info.blocks * worker.info.layout.block_size)
    if max_running is not None:
        yield fleet.rows.item(slot) / max_running
    empty, now = fleet.step_seconds.item(slot), fleet.beside_seconds.item(slot)
    yield (now - empty) / max(itl_seconds - empty, _LEAST_SLACK * itl_seconds)
