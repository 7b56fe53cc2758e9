"""KV memory that other processes of this machine may read and never write. Knows no peer and no ticket.

One memfd: a page-aligned table of block generations, then, on a CPU, the arena itself; a GPU's arena
is a plain CUDA allocation whose IPC handle travels beside the file. The file is sealed: no size
change, and no writable mapping but the owner's. It outlives its owner for as long as a reader maps
it, so a reader's copy ends well whenever the owner dies.

Not `multiprocessing.shared_memory`: on Python 3.11 a reader's exit unlinks it, and a killed owner leaves it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from diptych.types import BlockId, KvLayout, KvSource
from workers.engine.kv_memory import TORCH_DTYPE, KvMemory, read_granules
from workers.transfer import cuda_arena

if TYPE_CHECKING:
    from collections.abc import MutableSequence, Sequence

_PAGE: Final = 4096
_F_SEAL_FUTURE_WRITE: Final = 0x0010
"""Linux 5.1; Python 3.11 has no name for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaShape:
    """What a reader has to know to make sense of the file."""

    layout: KvLayout
    blocks: int
    device: str

    @property
    def table_bytes(self) -> int:
        """Of the generations, whole pages."""
        return -(-self.blocks * 8 // _PAGE) * _PAGE

    @property
    def arena_bytes(self) -> int:
        """Of the arena."""
        return self.blocks * self.layout.block_bytes

    @property
    def file_bytes(self) -> int:
        """The file holds the arena only where the CPU can read it."""
        return self.table_bytes + (self.arena_bytes if self.device == "cpu" else 0)


class SharedArena:
    """The owner's side."""

    def __init__(self, layout: KvLayout, blocks: int, device: torch.device) -> None:
        """Raises OSError when the machine has no memory files."""
        self.shape: Final = ArenaShape(layout=layout, blocks=blocks, device=device.type)
        written = os.memfd_create("diptych-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(written, self.shape.file_bytes)
            memory = mmap.mmap(written, self.shape.file_bytes)
            seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | _F_SEAL_FUTURE_WRITE
            fcntl.fcntl(written, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
            self.file: Final = os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(written)
        generations = cast("MutableSequence[int]", memoryview(memory)[: blocks * 8].cast("q"))
        self.table: Final = torch.frombuffer(memory, dtype=torch.int64, count=blocks)
        """The generations as a tensor, the same memory."""
        self.cuda_handle = b""
        if device.type == "cpu":
            arena = _tensor(memory, self.shape)
        else:
            arena, self.cuda_handle = cuda_arena.allocate(
                (blocks, *layout.block_shape), TORCH_DTYPE[layout.dtype], device
            )
        self.memory: Final = KvMemory(arena, generations)

    def view(self) -> ArenaView:
        """For a reader in this process."""
        return ArenaView(self.memory.arena, self.memory.generations)

    def close(self) -> None:
        """No new reader. The memory goes when nobody uses it."""
        os.close(self.file)


class ArenaView:
    """A reader's side: the arena and its generations, as they are at any moment."""

    def __init__(self, arena: Tensor, generations: Any) -> None:  # noqa: ANN401 (a sequence of numbers)
        self.arena: Final = arena
        self.generations: Final = generations

    def current(self, blocks: Sequence[BlockId]) -> tuple[int, ...] | None:
        """Generations, now; None when there is no such block."""
        if not all(0 <= block < len(self.generations) for block in blocks):
            return None
        return tuple(self.generations[block] for block in blocks)

    def read(self, source: KvSource, count: int, out: Tensor) -> Tensor:
        """A copy, as it would be packed for a wire: [bytes] uint8, in `out` if it can be."""
        packed = read_granules(self.arena, source, count, out)
        if packed.is_cuda:
            torch.cuda.current_stream(packed.device).synchronize()
        return packed

    @classmethod
    def of_file(cls, file: int, shape: ArenaShape, cuda_handle: bytes) -> ArenaView:
        """Maps the file, which the caller may close then."""
        # A private mapping of a file opened for reading: what the owner writes is seen, and a write
        # here would go to a page of our own.
        memory = mmap.mmap(file, shape.file_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        generations = memoryview(memory)[: shape.blocks * 8].cast("q")
        if shape.device == "cpu":
            return cls(_tensor(memory, shape), generations)
        size = (shape.blocks, *shape.layout.block_shape)
        return cls(cuda_arena.opened(cuda_handle, size, TORCH_DTYPE[shape.layout.dtype]), generations)


def _tensor(memory: mmap.mmap, shape: ArenaShape) -> Tensor:
    dtype = TORCH_DTYPE[shape.layout.dtype]
    count = shape.arena_bytes // dtype.itemsize
    flat = torch.frombuffer(memory, dtype=dtype, offset=shape.table_bytes, count=count)
    return flat.view(shape.blocks, *shape.layout.block_shape)
