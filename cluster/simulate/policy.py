"""Who decides where requests run: one interface for the real scheduler and for what it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.scheduler.costs import RequestShape
    from diptych.errors import ServingError
    from diptych.types import Outcome, Placement, Report, RequestId, Role, SetWorkerRole, WorkerId, WorkerInfo

Maker: TypeAlias = "Callable[[], Policy]"
"""A policy serves one run."""


class Policy(Protocol):
    """`now` is virtual seconds everywhere."""

    name: ClassVar[str]

    @property
    def weights(self) -> str:
        """In words; empty where there are none."""
        ...

    def join(self, info: WorkerInfo, now: float) -> None:
        """A worker, empty."""

    def leave(self, worker: WorkerId, epoch: int, now: float) -> None:
        """That incarnation is gone."""

    def report(self, report: Report, now: float) -> bool:
        """Whether the worker's next report has to be a full one."""
        ...

    def submit(self, shape: RequestShape, now: float) -> Placement | None:
        """Where it runs, or None: it waits. Raises ServingError."""

    def advance(self, now: float) -> Sequence[tuple[RequestId, Placement | ServingError]]:
        """Those that waited and whose turn it is."""
        ...

    def next_turn(self, now: float) -> float | None:
        """When to ask `advance` if nothing happens before."""

    def rescale(self, now: float) -> Sequence[SetWorkerRole]:
        """What its autoscaler wants changed; nothing without one."""
        ...

    def set_role(self, worker: WorkerId, epoch: int, role: Role) -> None:
        """What was wanted is done."""

    def spoke(self, request: RequestId, now: float) -> None:
        """Its first token came: its prompt is computed."""

    def finished(self, outcome: Outcome, now: float) -> None:
        """It ended, in whatever way."""
