"""Decode steps as CUDA graphs, one for each bucket of rows: a step is one launch, whatever it consists of.

A graph reads its batch from one static buffer and writes its logits to static memory. Rows that a
batch lacks in its bucket have no keys, write none and are not returned. Captured when first needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import Logits
from kernels.gpu.paged import PagedRows
from workers.engine.row_numbers import DeviceBatch, RowNumbers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUCKETS = (1, 2, 4, 8, *range(16, 257, 8))
"""Rows of the graphs. A larger batch goes without one: its launches cost little beside its work."""
_MOST = BUCKETS[-1]


def bucket_of(rows: int) -> int:
    """The smallest that holds so many."""
    return BUCKETS[bisect_left(BUCKETS, rows)]


class StaticBatch:
    """Room for the largest batch, on the host and on the device: tokens, positions, starts, then block ids."""

    def __init__(self, table_blocks: int, device: torch.device) -> None:
        """table_blocks: of the longest sequence."""
        size = _MOST * (3 + table_blocks)
        # Pinned, or the copy would wait for the device.
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._numbers: NDArray[np.int32] = self._host.numpy()
        self._there = torch.zeros(size, dtype=torch.int32, device=device)

    def fill(self, numbers: RowNumbers, bucket: int) -> None:
        """What is there is overwritten: nothing may still read it, on the host or on the device."""
        rows, ids = len(numbers.tokens), len(numbers.ids)
        here = self._numbers
        for part, values, padding in ((0, numbers.tokens, 0), (1, numbers.positions, -1), (2, numbers.starts, 0)):
            here[part * _MOST : part * _MOST + rows] = values
            here[part * _MOST + rows : part * _MOST + bucket] = padding
        end = 3 * _MOST + ids
        here[3 * _MOST : end] = numbers.ids
        self._there[:end].copy_(self._host[:end], non_blocking=True)

    def batch(self, bucket: int) -> DeviceBatch:
        """The first rows of it, on the device, all of them decoding."""
        tokens, positions, starts = (self._there[part * _MOST : part * _MOST + bucket] for part in range(3))
        rows = PagedRows(positions, starts, self._there[3 * _MOST :])
        return DeviceBatch(tokens=tokens, rows=rows, decode_rows=bucket, tiles=None, wanted=None)


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    """[bucket, vocabulary] fp32"""
    looks: Tensor
    """[2, bucket] int64: the highest logit's token, and whether all are finite."""


class DecodeGraphs:
    """For one arena, whose address the graphs hold."""

    def __init__(self, step: Callable[[DeviceBatch], Tensor], table_blocks: int, device: torch.device) -> None:
        """step: from a batch to its logits, all on the device, without waiting for it."""
        self._step = step
        self._static = StaticBatch(table_blocks, device)
        self._graphs: dict[int, _Graph] = {}
        self._logits: Tensor | None = None
        """[most rows, vocabulary] fp32, which all graphs write: one of their own each would take gigabytes."""
        # One pool for all: they never run at the same time, and what each returns stays allocated.
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, numbers: RowNumbers) -> Logits:
        """Rows that decode, up to as many as the largest bucket has. The logits lie there until the next run."""
        rows = len(numbers.tokens)
        bucket = bucket_of(rows)
        self._static.fill(numbers, bucket)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._captured(bucket)
        captured = self._graphs[bucket]
        captured.graph.replay()
        # The one wait of a step: after it the buffers are free for the next.
        highest, finite = captured.looks.cpu().numpy()
        return Logits(captured.logits[:rows], highest[:rows], finite[:rows] != 0)

    def _captured(self, bucket: int) -> _Graph:
        batch = self._static.batch(bucket)
        # Once for real, on a stream of its own: kernels are compiled and cuBLAS set up, which can't be
        # captured. It writes the batch's KV, and the graph will write the same again.
        side, ours = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(ours)
        with torch.cuda.stream(side):
            logits = self._step(batch)
            looks_of(logits)
        ours.wait_stream(side)
        if self._logits is None:
            self._logits = torch.empty(_MOST, logits.shape[1], dtype=torch.float32, device=logits.device)
        kept = self._logits[:bucket]
        graph = torch.cuda.CUDAGraph()
        # Other threads of a worker pack and send meanwhile; only what this one does must be capturable.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            kept.copy_(self._step(batch))
            looks = looks_of(kept)
        return _Graph(graph, kept, looks)


def looks_of(logits: Tensor) -> Tensor:
    """`kernels.Logits`' other fields, still on the device: [2, rows] int64. logits: [rows, vocabulary] fp32"""
    finite = torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))
    return torch.stack((logits.argmax(-1), finite.long()))
