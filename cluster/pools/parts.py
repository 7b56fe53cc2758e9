"""What pools know of each worker and each front, over all its processes. Does nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.config.values import Address
from cluster.pools.watch import Deaths
from diptych.types import FrontId, WorkerInfo, WorkerSpec


@dataclass(slots=True, eq=False)
class WorkerPart:
    spec: WorkerSpec
    handle: Any
    deaths: Deaths
    info: WorkerInfo | None = None
    """None while it isn't up."""
    lost: bool = False
    """It died too often and does not come back."""
    retiring: bool = False
    """It ends because somebody wants it to: its death is no news."""
    leaving: bool = False
    """Its node is to go, and it has a successor if its pool needs one."""
    node: str = ""
    """Ray's id of the only node where it may start; empty for any."""
    placed: bool = False
    """Ray has given its handle a process."""
    lacks: str = ""
    """What there is no room for, in words; empty when it doesn't wait, or not for long."""
    refusals: int = 0
    """How often in a row Ray had no room for it in time."""

    @property
    def absence(self) -> str:
        """Why it isn't there, in words, if that lasts; of one that may only be on one node nobody has to know."""
        if self.lost:
            return f"died {self.deaths} and is not replaced"
        return "" if self.info or self.node else self.lacks

    @property
    def where(self) -> str:
        """The node where it is, or may only be; empty while nobody knows."""
        return self.info.node if self.info else self.node


@dataclass(slots=True, eq=False)
class FrontPart:
    number: int
    http: Address
    grpc: Address
    deaths: Deaths
    handle: Any = None
    pid: int | None = None
    incarnation: int = 0
    prepared: bool = False
    lost: bool = False

    @property
    def place(self) -> str:
        """What operators call it."""
        return f"front-{self.number}"

    @property
    def id(self) -> FrontId:
        """Another one for each process: workers must not mistake a new front for the one that died."""
        return FrontId(self.place + (f".{self.incarnation}" if self.incarnation else ""))
