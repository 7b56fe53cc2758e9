"""What can happen to the cluster, as the view folds it in. Knows no order and no consequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from diptych.types import BlockHash, Outcome, Placement, Report, RequestId, Role, WorkerId, WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """`at` is monotonic seconds, here and below."""

    info: WorkerInfo
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft:
    """That incarnation of the worker is gone, by its own word or by its pool's."""

    worker: WorkerId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDrains:
    """It gets nothing new; its cache can still be borrowed from."""

    worker: WorkerId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged:
    """What it gets from now on; what it has it keeps."""

    worker: WorkerId
    epoch: int
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A worker's report arrived."""

    report: Report
    at: float


class RequestPlaced(NamedTuple):
    """A decision of ours, counted against its workers until their reports show it."""

    at: float
    request: RequestId
    placement: Placement
    rank: int
    granules: tuple[BlockHash, ...]
    tokens: int
    """To compute."""
    seconds: float
    """To compute them."""
    blocks: int
    """Of the prompt, that the decode worker lacks."""
    context_tokens: float
    """What decoding will read in each step, on average."""

    @property
    def computes(self) -> WorkerId:
        """Who computes the prompt."""
        return self.placement.prefill or self.placement.decode


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """A front told how it went."""

    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePassed:
    """It is now `at`: who was silent for too long is stale."""

    at: float


Event: TypeAlias = (
    WorkerJoined | WorkerLeft | WorkerDrains | RoleChanged | Reported | RequestPlaced | RequestFinished | TimePassed
)
