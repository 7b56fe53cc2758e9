"""Memory for packed KV, used again: a fresh buffer costs a page fault for every 4 KiB, more than the copy. Knows bytes.

Only what is certainly over is given back: a link that broke may still write into its buffer, so that one is dropped.
"""

from __future__ import annotations

import threading
from typing import Final

import torch
from torch import Tensor

KEPT_BYTES: Final = 64 << 20
"""Of buffers that nobody uses."""


class Buffers:
    """Of one worker, in the memory of its CPU. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Tensor] = []

    def take(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 with any content, the caller's alone."""
        with self._lock:
            fits = [place for place, buffer in enumerate(self._free) if nbytes <= len(buffer) <= 4 * nbytes]
            if fits:
                return self._free.pop(min(fits, key=lambda place: len(self._free[place])))[:nbytes]
        return torch.empty(nbytes, dtype=torch.uint8)

    def give(self, taken: Tensor) -> None:
        """Nobody reads or writes it any more. What isn't plain memory of the CPU is left alone."""
        buffer = taken if taken._base is None else taken._base
        if buffer.device.type != "cpu" or buffer.dtype != torch.uint8 or buffer.dim() != 1:
            return
        with self._lock:
            if sum(map(len, self._free)) + len(buffer) <= KEPT_BYTES:
                self._free.append(buffer)
