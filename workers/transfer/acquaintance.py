"""How one worker's KV comes to another: by trying, when they meet. Knows offers, no ticket.

What reads comes before what sends: a process's own memory, then a mapping (found by trying: two
pods on one host can't always map), then NCCL between GPUs and gloo between others.
"""

from __future__ import annotations

import threading

from diptych.errors import TransferFailed
from diptych.types import KvLayout, KvOffer, LinkKind, Wire, WorkerId, WorkerSpec
from workers.transfer.doorway import enter
from workers.transfer.legs import match_legs, narrower
from workers.transfer.nixl import NixlAgent
from workers.transfer.pairs import READS, Source
from workers.transfer.read_link import View
from workers.transfer.shared_arena import ArenaView, SharedArena


class Neighbours:
    """The arenas of workers in one process. For any thread."""

    def __init__(self) -> None:
        self._arenas: dict[tuple[WorkerId, int], SharedArena] = {}
        self._lock = threading.Lock()

    def add(self, worker: WorkerId, epoch: int, arena: SharedArena) -> None:
        with self._lock:
            self._arenas[worker, epoch] = arena

    def remove(self, worker: WorkerId, epoch: int) -> None:
        with self._lock:
            self._arenas.pop((worker, epoch), None)

    def view(self, worker: WorkerId, epoch: int) -> ArenaView | None:
        with self._lock:
            arena = self._arenas.get((worker, epoch))
        return arena.view() if arena else None


class Acquaintance:
    """Of one worker with its peers."""

    def __init__(
        self, spec: WorkerSpec, layout: KvLayout, neighbours: Neighbours, nixl: NixlAgent | None = None
    ) -> None:
        self._spec = spec
        self._layout = layout
        self._neighbours = neighbours
        self._nixl = nixl

    def source(self, offer: KvOffer) -> Source:
        """May take seconds. Raises LayoutMismatch, or TransferFailed when the link that was asked for can't be had."""
        legs = match_legs(offer.layout, self._layout)
        link, view = self._link(offer)
        return Source(offer=offer, link=link, wire=self._wire(offer, link), legs=legs, view=view)

    def _link(self, offer: KvOffer) -> tuple[LinkKind, View | None]:
        wanted = self._spec.link
        if wanted in ("gloo", "nccl"):
            return wanted, None
        if wanted == "nixl":
            assert self._nixl is not None, "a worker with this link starts with an agent"
            return wanted, self._nixl.view(offer)
        if wanted != "mapped" and (view := self._neighbours.view(offer.worker, offer.epoch)):
            return "loopback", view
        if wanted == "loopback":
            raise TransferFailed(f"{offer.worker} and {self._spec.id} are not in one process: set kv.link to auto")
        try:
            if not offer.mapped:
                raise TransferFailed(f"{offer.worker} lets nobody map its KV")
            if offer.device != self._spec.device:
                raise TransferFailed(f"{offer.worker} is on {offer.device}, {self._spec.id} on {self._spec.device}")
            return "mapped", enter(offer.mapped, self._spec.secret, offer.layout)
        except TransferFailed:
            if wanted == "mapped":
                raise
        return ("nccl" if offer.device == self._spec.device == "cuda" else "gloo"), None

    def _wire(self, offer: KvOffer, link: LinkKind) -> Wire:
        if self._spec.wire == "native" or link in READS:
            return narrower(offer.layout, self._layout)
        return self._spec.wire
