"""What goes into a simulation beside trace and constants, and what comes out. Knows no events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.simulate.asked import Asked
    from diptych.types import Role, WorkerId, WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A worker dies at `at` and is back, empty, `absent_seconds` later."""

    worker: WorkerId
    at: float
    absent_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Look:
    """The workers at one moment."""

    at: float
    running: tuple[int, ...]
    """Sequences in each worker's batch, in the order of the workers."""
    waiting_tokens: tuple[int, ...]
    """Prompt tokens each one has still to compute."""


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A worker does something else from then on."""

    at: float
    worker: WorkerId
    role: Role


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a simulation."""

    asked: tuple[Asked, ...]
    workers: tuple[WorkerInfo, ...]
    """In their last roles."""
    tokens_emitted: tuple[int, ...]
    """By each worker, in the order of `workers`."""
    busy_seconds: tuple[float, ...]
    """Of each worker, computing."""
    looks: tuple[Look, ...]
    role_changes: tuple[RoleChange, ...]
    """By rising time."""
    seconds: float
    """Virtual, until the last request ended."""
