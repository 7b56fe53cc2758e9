"""KV read over NIXL, between machines too: RDMA where UCX finds it, TCP and shared memory elsewhere. Knows no ticket.

As over a mapping the receiver reads the sender's leased blocks and, after them, their generations.
NIXL neither authenticates nor encrypts, so isolate its ports like those of gloo. An optional extra:
chosen by kv.link = nixl, never by auto.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import torch

from diptych.errors import TransferFailed
from diptych.types import BlockId, KvOffer, KvSource, NixlOffer
from workers.engine.kv_memory import TORCH_DTYPE, read_granules

if TYPE_CHECKING:
    from torch import Tensor

    from workers.transfer.shared_arena import SharedArena

_LOOK_SECONDS = 0.0002
"""NIXL has nothing to wait on; only the pair's own thread looks."""
_HOST, _GPU = "DRAM", "VRAM"


class NixlAgent:
    """Of one worker. For any thread: NIXL's own calls are made one at a time."""

    def __init__(self, name: str, arena: SharedArena, timeout_seconds: float) -> None:
        """Raises ImportError without the nixl package."""
        api: Any = import_module("nixl._api")
        self._agent = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
        self._lock = threading.Lock()
        self._timeout_seconds = timeout_seconds
        self._registered: Final = [self._agent.register_memory(part) for part in (arena.memory.arena, arena.table)]
        self.offer: Final = NixlOffer(
            metadata=self._agent.get_agent_metadata(),
            arena=arena.memory.arena.data_ptr(),
            generations=arena.table.data_ptr(),
            blocks=arena.shape.blocks,
        )

    def view(self, offer: KvOffer) -> NixlView:
        """Of a peer's arena. Raises TransferFailed."""
        if offer.nixl is None:
            raise TransferFailed(f"{offer.worker} has no NIXL: set kv.link = nixl for both")
        with self._lock, _failures(f"{offer.worker} can't be reached by NIXL"):
            name = self._agent.add_remote_agent(offer.nixl.metadata)
        return NixlView(self, offer, offer.nixl, name if isinstance(name, str) else name.decode())

    def read(self, peer: str, remote: Sequence[tuple[int, int]], kind: str, into: Tensor) -> None:
        """Pieces (address, bytes) of a peer's memory, one after the other. Raises TransferFailed within the timeout."""
        local = [(into.data_ptr() + start, size, 0) for start, size in _starts(remote)]
        with _failures("NIXL"):
            with self._lock:
                registered = self._agent.register_memory(into)
                handle = self._agent.initialize_xfer(
                    "READ",
                    self._agent.get_xfer_descs(local, _GPU if into.is_cuda else _HOST),
                    self._agent.get_xfer_descs([(at, size, 0) for at, size in remote], kind),
                    peer,
                )
                state = self._agent.transfer(handle)
            try:
                deadline = time.monotonic() + self._timeout_seconds
                while state not in ("DONE", "ERR"):
                    if time.monotonic() > deadline:
                        raise TransferFailed(f"NIXL read nothing within {self._timeout_seconds} s")
                    time.sleep(_LOOK_SECONDS)
                    with self._lock:
                        state = self._agent.check_xfer_state(handle)
            finally:
                with self._lock:
                    self._agent.release_xfer_handle(handle)
                    self._agent.deregister_memory(registered)
            if state == "ERR":
                raise TransferFailed("NIXL lost the other side")


class NixlView:
    """A peer's arena, as a reader sees it."""

    def __init__(self, agent: NixlAgent, offer: KvOffer, nixl: NixlOffer, peer: str) -> None:
        self._agent = agent
        self._offer = offer
        self._nixl = nixl
        self._peer = peer

    def current(self, blocks: Sequence[BlockId]) -> tuple[int, ...] | None:
        """Generations, now; None when there is no such block."""
        if not all(0 <= block < self._nixl.blocks for block in blocks):
            return None
        table = torch.zeros(len(blocks), dtype=torch.int64)
        self._agent.read(self._peer, [(self._nixl.generations + 8 * block, 8) for block in blocks], _HOST, table)
        return tuple(int(table[at].item()) for at in range(len(blocks)))

    def read(self, source: KvSource, count: int, out: Tensor) -> Tensor:
        """As it would be packed for a wire: [bytes] uint8, in `out` if it can be."""
        layout = self._offer.layout
        size, on = layout.block_bytes, "cuda" if self._offer.device == "cuda" else "cpu"
        shape = (len(source.blocks), *layout.block_shape)
        staging = torch.empty(shape, dtype=TORCH_DTYPE[layout.dtype], device=on)
        kind = _GPU if on == "cuda" else _HOST
        self._agent.read(
            self._peer, [(self._nixl.arena + size * block, size) for block in source.blocks], kind, staging
        )
        numbers = tuple(BlockId(number) for number in range(len(source.blocks)))
        return read_granules(staging, source.at(numbers), count, out)


def _starts(pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = 0
    for _, size in pieces:
        yield at, size
        at += size


@contextmanager
def _failures(what: str) -> Generator[None]:
    """NIXL's own exceptions have no common class but RuntimeError's neighbours."""
    try:
        yield
    except TransferFailed:
        raise
    except Exception as error:
        raise TransferFailed(f"{what}: {error}") from error
