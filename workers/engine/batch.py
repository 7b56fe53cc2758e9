"""What one step computes: as numbers, and as the tensors that `Model` wants. Knows no sequence, no role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import kernels
from kernels import Segment
from kernels.reference.attention import SPLIT
from workers.engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step: decode rows first, those with the most keys first, then prompt chunks."""

    tokens: Sequence[int]
    segments: Sequence[Segment]
    """Of the tokens, in this order; a decode row is a segment of one."""
    decode_rows: int
    wanted: Sequence[int]
    """Rows whose logits are wanted."""


class ForwardPass(Protocol):
    """A model, however it computes."""

    config: ModelConfig

    def forward(self, batch: Batch, arena: Tensor) -> kernels.Logits:
        """Writes the batch's KV into `arena` and returns the wanted rows' logits."""
        ...


class Chunk(NamedTuple):
    """Some prompt tokens of one sequence: rows [first_row, last_row) of the batch."""

    first_row: int
    last_row: int
    start: int
    """Position of the first of them."""
    blocks: Tensor
    """[whole splits] the sequence's block ids, padded with any valid id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTensors:
    """A batch on a device."""

    tokens: Tensor
    """[rows] ids."""
    positions: Tensor
    """[rows]"""
    blocks: Tensor
    """[rows] the block each row's KV goes to, and `offsets` [rows] the place in it."""
    offsets: Tensor
    decode_rows: int
    table: kernels.DecodeTable | None
    chunks: tuple[Chunk, ...]
    logit_rows: Tensor
    """[wanted] rows whose logits are wanted."""


def batch_tensors(batch: Batch, block_size: int, device: torch.device) -> BatchTensors:
    """`batch` where a model can read it."""

    def ids(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    decodes = batch.segments[: batch.decode_rows]
    chunks: list[Chunk] = []
    row = len(decodes)
    for start, count, blocks in batch.segments[batch.decode_rows :]:
        padded = _whole_splits(blocks, start + count, block_size)
        chunks.append(Chunk(row, row + count, start, ids(padded)))
        row += count
    at = [(each, range(each.start, each.start + each.count)) for each in batch.segments]
    positions = ids([position for _, span in at for position in span])
    return BatchTensors(
        tokens=ids(batch.tokens),
        positions=positions,
        blocks=ids([each.blocks[position // block_size] for each, span in at for position in span]),
        offsets=positions % block_size,
        decode_rows=len(decodes),
        table=_table(decodes, block_size, device) if decodes else None,
        chunks=tuple(chunks),
        logit_rows=ids(batch.wanted),
    )


def looked_at(values: Tensor) -> kernels.Logits:
    """values: [rows, vocabulary] fp32"""
    # The extremes tell, NaN included, in a fraction of the time that a look at each number takes.
    finite = torch.isfinite(values.amax(-1)) & torch.isfinite(values.amin(-1))
    return kernels.Logits(values, values.argmax(-1).cpu().numpy(), finite.cpu().numpy())  # pyright: ignore[reportUnknownMemberType]


def _table(decodes: Sequence[Segment], block_size: int, device: torch.device) -> kernels.DecodeTable:
    lengths = [each.start + 1 for each in decodes]
    reach = tuple(sum(length > at for length in lengths) for at in range(0, lengths[0], SPLIT))
    padded = [_whole_splits(each.blocks, lengths[0], block_size) for each in decodes]
    return kernels.DecodeTable(
        torch.tensor(padded, device=device), torch.tensor(lengths, dtype=torch.int64, device=device), reach
    )


def _whole_splits(blocks: Sequence[int], length: int, block_size: int) -> list[int]:
    """Block ids for whole splits up to `length` positions.

    Padded with a block of its own: what another sequence's holds may have just overflowed.
    """
    wanted = -(-length // SPLIT) * SPLIT // block_size
    own = list(blocks[:wanted])
    return own + own[:1] * (wanted - len(own))
