"""Several schedulers, each for the prompts whose beginning hashes to it: what a cluster too large for one would have.

All hear every worker's reports; none hears of what another placed before a report shows it. Prompts that share more
than a system prompt share a scheduler, so what is promised there is known where it is asked for. The first block alone
would not do: in Mooncake's conversations it is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar
from zlib import crc32

from cluster.simulate.ours import Ours

if TYPE_CHECKING:
    from cluster.scheduler.costs import RequestShape
    from diptych.errors import ServingError
    from diptych.types import Outcome, Placement, Report, RequestId, Role, SetWorkerRole, WorkerId, WorkerInfo

COUNTS = (2, 4, 8)
BEGINNING = 64
"""Granules of a prompt that say whose it is: 1,024 tokens."""


class Sharded:
    """`Ours`, so many times."""

    name: ClassVar[str] = "ours, sharded"

    def __init__(self, count: int) -> None:
        self._shards = [Ours() for _ in range(count)]
        self._asked: dict[RequestId, Ours] = {}

    @property
    def weights(self) -> str:
        return f"{len(self._shards)} schedulers"

    def join(self, info: WorkerInfo, now: float) -> None:
        for shard in self._shards:
            shard.join(info, now)

    def leave(self, worker: WorkerId, epoch: int, now: float) -> None:
        for shard in self._shards:
            shard.leave(worker, epoch, now)

    def rescale(self, now: float) -> Sequence[SetWorkerRole]:
        """Each has its own view of what is asked for: none decides for all."""
        del now
        return ()

    def set_role(self, worker: WorkerId, epoch: int, role: Role) -> None:
        for shard in self._shards:
            shard.set_role(worker, epoch, role)

    def report(self, report: Report, now: float) -> bool:
        needs_full = [shard.report(report, now) for shard in self._shards]
        return any(needs_full)

    def submit(self, shape: RequestShape, now: float) -> Placement | None:
        names = shape.granules[:BEGINNING]
        shard = self._shards[crc32(names[-1] if names else b"") % len(self._shards)]
        self._asked[shape.request] = shard
        return shard.submit(shape, now)

    def advance(self, now: float) -> Sequence[tuple[RequestId, Placement | ServingError]]:
        return [each for shard in self._shards for each in shard.advance(now)]

    def next_turn(self, now: float) -> float | None:
        turns = [turn for shard in self._shards if (turn := shard.next_turn(now)) is not None]
        return min(turns, default=None)

    def spoke(self, request: RequestId, now: float) -> None:
        """Fronts don't tell."""

    def finished(self, outcome: Outcome, now: float) -> None:
        self._asked.pop(outcome.request).finished(outcome, now)


SHARDED: dict[str, Callable[[], Sharded]] = {f"ours-{count}": partial(Sharded, count) for count in COUNTS}
"""By the names that `--policy` knows them by."""
