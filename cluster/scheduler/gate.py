"""When there is room to place somebody: late enough that order can still be chosen, early enough that nobody idles.

A prompt is placed when a worker that could compute it is about to run out of prompts, and a worker
has room to decode it, or nobody who waits for its room: who is computed meanwhile joins at once when
there is some. "About to" is twice the time between that worker's reports, as it was measured: once
for us to learn that it is idle, once for what we send to be there. So no worker idles while a prompt
that it could take waits, and few wait where their order can't be changed any more.
Workers serve by priority: for an important request the less important ones' work is not in its way.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cluster.scheduler.costs import RequestShape, Rule
    from cluster.scheduler.events import RequestPlaced
    from cluster.scheduler.fleet import Array
    from cluster.scheduler.view import ClusterView, WorkerView
    from diptych.types import Load, RequestId, WorkerId

NEVER: Final = float("inf")
"""No time will do it; news may."""
_NEWEST = 0.125
"""Weight of the newest gap between two reports."""
_GAPS = 2
_ARRIVED_SECONDS = 5.0
"""Whoever was sent longer ago has arrived, and is in the worker's reports as long as it is there."""
_NOTHING_SECONDS = 1e-6
"""Rounding must not shut the gate at the very time at which it was said to open."""


class _Pools(NamedTuple):
    """Who could take a request some day, by slot."""

    senders: NDArray[np.bool_]
    receivers: NDArray[np.bool_]
    alone: NDArray[np.bool_]
    """Those whose work it is to compute a prompt and decode it: a decode pool's only without prefill."""


class Gate:
    """Reads the view; keeps what it learned of reports. Columns by slot, as the fleet's."""

    def __init__(self, view: ClusterView, how: Rule, *, max_running: int | None, report_seconds: float) -> None:
        """`max_running`: sequences that a worker takes on; `report_seconds`: between reports, until that was seen."""
        self._view = view
        self._how = how
        self._max_running = NEVER if max_running is None else max_running
        self._report_seconds = report_seconds
        self._gaps = np.zeros(0)
        """Seconds between reports; 0 until that was seen."""
        self._waiting = np.zeros(0)
        """Requests that wait there, or are on their way."""
        self._requests = np.zeros(0)
        """As `_waiting`, and those that run."""
        self._sent: defaultdict[int, dict[RequestId, float]] = defaultdict(dict)
        """When each request was sent to where it is decoded, of those that aren't known to be over."""
        self._slots: dict[RequestId, int] = {}

    # ---- asked --------------------------------------------------------------------------------------------

    def wait_seconds(self, shape: RequestShape, rank: int, now: float) -> float:
        """Until there is room for it: 0 is now, NEVER is not before a worker has news.

        Also 0 when nobody could ever take it: placing it says why.
        """
        pools = self._pools(shape)
        if not (pools.alone.any() or (pools.senders.any() and pools.receivers.any())):
            return 0.0
        excess, decodes = self._excess_seconds(rank, now), self._can_decode(shape)
        wait = _least(excess, pools.alone & decodes)
        if wait > 0 and (pools.receivers & decodes).any():
            wait = min(wait, _least(excess, pools.senders & self._can_compute(shape)))
        return wait

    def may_go_elsewhere(self, shape: RequestShape, rank: int, now: float) -> bool:
        """Whether a decode worker, which computes prompts only where that is cheapest, could begin with it."""
        fleet = self._view.fleet
        if self._how != "auto" or not fleet.placeable["prefill"]:
            return False
        decode = (fleet.decode == 0) & (fleet.most_tokens >= shape.context)
        return _least(self._excess_seconds(rank, now), decode & self._can_decode(shape)) <= 0

    def is_open_at(self, worker: WorkerId, rank: int, now: float) -> bool:
        """Whether it is about to run out of prompts as important."""
        return bool(self._excess_seconds(rank, now)[self._view.workers[worker].slot] <= 0)

    @property
    def typical_bound_seconds(self) -> float:
        """Mean of what is before somebody where he is placed."""
        seen = self._gaps[self._gaps > 0]
        return _GAPS * (float(seen.mean()) if len(seen) else self._report_seconds)

    # ---- told ---------------------------------------------------------------------------------------------

    def joined(self, worker: WorkerView) -> None:
        """Nothing is known of it."""
        self._grow()
        self._gaps[worker.slot] = self._waiting[worker.slot] = self._requests[worker.slot] = 0.0
        for request in self._sent.pop(worker.slot, ()):
            del self._slots[request]

    def reported(self, before: WorkerView, load: Load, now: float) -> None:
        """A worker's next report."""
        slot = before.slot
        if before.load.waiting_tokens:
            known = self._gaps[slot] or self._report_seconds
            self._gaps[slot] = known + _NEWEST * (now - before.heard - known)
        there, sent = load.running_requests + load.waiting_requests, self._sent[slot]
        while len(sent) > there and now - next(iter(sent.values())) > _ARRIVED_SECONDS:
            self.finished(next(iter(sent)))  # its front died before it could tell
        # Who was sent and isn't over is there, or on the way, whatever a report says that left before.
        self._requests[slot] = max(there, len(sent))
        self._waiting[slot] = max(load.waiting_requests, len(sent) - load.running_requests)

    def placed(self, placed: RequestPlaced) -> None:
        """One more is on the way."""
        self.finished(placed.request)
        decodes = self._view.workers[placed.placement.decode].slot
        self._sent[decodes][placed.request], self._slots[placed.request] = placed.at, decodes
        self._requests[decodes] += 1
        for worker in {placed.computes, placed.placement.decode}:
            self._waiting[self._view.workers[worker].slot] += 1

    def finished(self, request: RequestId) -> None:
        """It is over, or is placed again."""
        slot = self._slots.pop(request, None)
        if slot is not None:
            del self._sent[slot][request]

    # ---- inside -------------------------------------------------------------------------------------------

    def _pools(self, shape: RequestShape) -> _Pools:
        fleet, how = self._view.fleet, self._how
        prefill, decode, mixed = fleet.prefill == 0, fleet.decode == 0, fleet.mixed == 0
        holds_prompt, holds_all = fleet.most_tokens >= shape.prompt_tokens, fleet.most_tokens >= shape.context
        nobody = np.zeros_like(prefill)
        alone = mixed | decode if how == "local" or not fleet.placeable["prefill"] else mixed
        return _Pools(
            senders=nobody if how == "local" else (prefill if fleet.placeable["prefill"] else mixed) & holds_prompt,
            receivers=(decode if fleet.placeable["decode"] else mixed) & holds_all,
            alone=nobody if how == "remote" else alone & holds_all,
        )

    def _bounds_seconds(self) -> Array:
        """Work that keeps each from idling until we learn of it."""
        return _GAPS * np.where(self._gaps > 0, self._gaps, self._report_seconds)

    def _excess_seconds(self, rank: int, now: float) -> Array:
        """Until each is about to run out of prompts; 0 where it is."""
        excess = self._view.fleet.idle_at[rank] - now - self._bounds_seconds()
        return np.where(excess > _NOTHING_SECONDS, excess, 0.0)

    def _can_compute(self, shape: RequestShape) -> NDArray[np.bool_]:
        return (self._waiting == 0) | self._has_room(shape.prompt_tokens)

    def _can_decode(self, shape: RequestShape) -> NDArray[np.bool_]:
        # One token more: the answer's first.
        fits = self._has_room(shape.prompt_tokens + 1) & (self._requests < self._max_running)
        return (self._waiting == 0) | fits

    def _has_room(self, tokens: int) -> NDArray[np.bool_]:
        """Blocks for so many tokens, whether some of them are cached or not."""
        return self._view.fleet.room_tokens >= tokens

    def _grow(self) -> None:
        more = len(self._view.fleet) - len(self._gaps)
        self._gaps, self._waiting, self._requests = (
            np.concatenate((column, np.zeros(more))) for column in (self._gaps, self._waiting, self._requests)
        )


def _least(seconds: Array, among: NDArray[np.bool_]) -> float:
    return float(seconds[among].min()) if among.any() else NEVER
