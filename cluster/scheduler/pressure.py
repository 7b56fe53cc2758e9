"""How much there is to do for each worker, read from the view and the queues. Decides nothing, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.scheduler.autoscaler import Pressure, WorkerPressure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.scheduler.view import ClusterView, WorkerView
    from diptych.types import Role

_LEAST_SLACK = 0.1
"""Of the wished pace: where even an empty step takes nearly as long, or longer, answers can't keep it."""


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
            for worker in _of(view, "prefill")
        ),
        decode=tuple(
            WorkerPressure(worker.info.id, max(_shares(view, worker, itl_seconds, max_running)))
            for worker in _of(view, "decode")
        ),
    )


def _of(view: ClusterView, role: Role) -> list[WorkerView]:
    return view.pool(role)


def _shares(view: ClusterView, worker: WorkerView, itl_seconds: float, max_running: int | None) -> Iterator[float]:
    """Of each thing that answers need."""
    fleet, slot = view.fleet, worker.slot
    yield 1.0 - max(0.0, fleet.room_tokens.item(slot)) / max(1, worker.info.blocks * worker.info.layout.block_size)
    if max_running is not None:
        yield fleet.rows.item(slot) / max_running
    empty, now = fleet.step_seconds.item(slot), fleet.beside_seconds.item(slot)
    yield (now - empty) / max(itl_seconds - empty, _LEAST_SLACK * itl_seconds)
