"""When there is room to place somebody: late enough that order can still be chosen, early enough that nobody idles.

A prompt is placed when a worker that could compute it is about to run out of prompts, and when a
worker has room to decode it. "About to" is twice the time between that worker's reports, as it was
measured: once for us to learn that it is idle, once for what we send to be there. So no worker idles
while a prompt that it could take waits, and few wait where their order can't be changed any more.
Workers serve by priority: for an important request the less important ones' work is not in its way.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from cluster.scheduler.admission import CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.scheduler.costs import RequestShape, Rule
    from cluster.scheduler.forecast import Forecast
    from cluster.scheduler.view import ClusterView, WorkerView
    from diptych.types import WorkerId

NEVER: Final = float("inf")
"""No time will do it; news may."""
_NEWEST = 0.125
"""Weight of the newest gap between two reports."""
_GAPS = 2


class Gate:
    """Reads the view; keeps what it learned of reports and whom it let through."""

    def __init__(
        self, view: ClusterView, forecast: Forecast, how: Rule, *, max_running: int | None, report_seconds: float
    ) -> None:
        """`max_running`: sequences that a worker takes on; `report_seconds`: between reports, until that was seen."""
        self._view = view
        self._forecast = forecast
        self._how = how
        self._max_running = max_running
        self._report_seconds = report_seconds
        self._gaps: dict[WorkerId, float] = {}
        self._let_through: defaultdict[WorkerId, list[float]] = defaultdict(lambda: [0.0] * len(CLASSES))
        """Seconds of work by rank, each at most what can be left of it."""

    def wait_seconds(self, shape: RequestShape, rank: int, now: float) -> float:
        """Until there is room for it: 0 is now, NEVER is not before a worker has news.

        Also 0 when nobody could ever take it: placing it says why.
        """
        senders, receivers, alone = self._senders(shape), self._receivers(shape), self._alone(shape)
        if not (alone or (senders and receivers)):
            return 0.0
        wait = self._soonest(alone, shape, rank, now, decodes=True)
        if wait > 0 and any(self._can_decode(worker, shape) for worker in receivers):
            wait = min(wait, self._soonest(senders, shape, rank, now, decodes=False))
        return wait

    def may_go_elsewhere(self, shape: RequestShape, rank: int, now: float) -> bool:
        """Whether a decode worker, which computes prompts only where that is cheapest, could begin with it."""
        if self._how != "auto" or not self._view.pool("prefill"):
            return False
        decode = [worker for worker in self._view.pool("decode") if worker.info.max_context >= shape.context]
        return self._soonest(decode, shape, rank, now, decodes=True) <= 0

    def excess_seconds(self, worker: WorkerId, rank: int, now: float) -> float:
        """Until the worker is about to run out of prompts as important; 0 when it is."""
        return max(0.0, self._backlog_seconds(worker, rank, now) - self.bound_seconds(worker))

    def bound_seconds(self, worker: WorkerId) -> float:
        """Work that keeps it from idling until we learn of it."""
        return _GAPS * self._gaps.get(worker, self._report_seconds)

    def reported(self, worker: WorkerId, seconds: float) -> None:
        """So long after its last report, in which prompts waited."""
        known = self._gaps.get(worker, self._report_seconds)
        self._gaps[worker] = known + _NEWEST * (seconds - known)

    def placed(self, worker: WorkerId, rank: int, seconds: float) -> None:
        """It computes one more prompt."""
        self._let_through[worker][rank] += seconds

    def forget(self, worker: WorkerId) -> None:
        """It is gone."""
        self._gaps.pop(worker, None)
        self._let_through.pop(worker, None)

    def _backlog_seconds(self, worker: WorkerId, rank: int, now: float) -> float:
        """As the worker serves the more important first, what is left of its work is the less important's."""
        total = left = self._forecast.backlog_seconds(worker, now)
        let_through = self._let_through[worker]
        for less in range(len(CLASSES) - 1, -1, -1):
            let_through[less] = min(let_through[less], left)
            left -= let_through[less]
        return total - sum(let_through[rank + 1 :])

    def _senders(self, shape: RequestShape) -> list[WorkerView]:
        if self._how == "local":
            return []
        pool = self._view.pool("prefill") or self._view.pool("mixed")
        return [worker for worker in pool if worker.info.max_context >= shape.prompt_tokens]

    def _receivers(self, shape: RequestShape) -> list[WorkerView]:
        pool = self._view.pool("decode") or self._view.pool("mixed")
        return [worker for worker in pool if worker.info.max_context >= shape.context]

    def _alone(self, shape: RequestShape) -> list[WorkerView]:
        """Those whose work it is to compute a prompt and decode it. A decode pool has that only without prefill."""
        if self._how == "remote":
            return []
        pool = self._view.pool("mixed")
        if self._how == "local" or not self._view.pool("prefill"):
            pool = pool + self._view.pool("decode")
        return [worker for worker in pool if worker.info.max_context >= shape.context]

    def _soonest(
        self, workers: Iterable[WorkerView], shape: RequestShape, rank: int, now: float, *, decodes: bool
    ) -> float:
        soonest = NEVER
        for worker in workers:
            if self._can_decode(worker, shape) if decodes else self._has_room(worker, shape.prompt_tokens):
                soonest = min(soonest, self.excess_seconds(worker.info.id, rank, now))
                if soonest <= 0:
                    break
        return soonest

    def _can_decode(self, worker: WorkerView, shape: RequestShape) -> bool:
        # One token more: the answer's first.
        fits = self._has_room(worker, shape.prompt_tokens + 1)
        return fits and (self._max_running is None or self._view.fleet.requests[worker.slot] < self._max_running)

    def _has_room(self, worker: WorkerView, tokens: int) -> bool:
        """Blocks for so many tokens, whether it has some of them cached or not."""
        return bool(self._view.fleet.room_blocks[worker.slot] >= -(-tokens // worker.info.layout.block_size))
