"""One step after another: plan, run the model, choose tokens. Knows no thread, role or network.

Everything here belongs to one thread. What a caller does between steps (add, cancel, land a
hand-off's blocks) takes effect in the next one.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import kernels
from diptych.errors import Internal, ServingError
from diptych.types import BlockId, Counters, Eviction, KvDtype, KvLayout, KvLeg, KvSource, Load, Wire
from workers.engine.batch import Batch, ForwardPass
from workers.engine.batching import Batcher, StepPlan, Work
from workers.engine.blocks import BlockPool
from workers.engine.kv_memory import KvMemory, locate_granules, private_memory, read_granules
from workers.engine.model_config import ModelConfig
from workers.engine.sampling import Sampled, Sampler, score_prompt
from workers.engine.sequence import Sequence

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine may use."""

    block_size: int
    blocks: int
    max_batch_tokens: int
    max_running: int
    max_context: int
    eviction: Eviction = "lru"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did."""

    plan: StepPlan
    sampled: tuple[Sampled, ...]
    failed: tuple[tuple[Sequence, ServingError], ...]


def layout_of(config: ModelConfig, block_size: int, dtype: KvDtype) -> KvLayout:
    """Of one worker with the whole model."""
    return KvLayout(
        layers=config.layers, kv_heads=config.kv_heads, block_size=block_size, head_dim=config.head_dim, dtype=dtype
    )


class Engine:
    """A model, its KV arena, and the sequences on it."""

    def __init__(
        self,
        model: ForwardPass,
        limits: EngineLimits,
        *,
        dtype: KvDtype,
        device: torch.device,
        memory: KvMemory | None = None,
    ) -> None:
        """`dtype` is the cache's. `memory` of the layout that `layout_of` gives; None for one of its own."""
        self.layout = layout_of(model.config, limits.block_size, dtype)
        self.limits = limits
        memory = memory or private_memory(self.layout, limits.blocks, device)
        self.arena = memory.arena
        self.pool = BlockPool(limits.blocks, memory.generations, limits.eviction)
        self.batcher = Batcher(
            self.pool,
            block_size=limits.block_size,
            max_batch_tokens=limits.max_batch_tokens,
            max_running=limits.max_running,
        )
        self._model = model
        self._device = device
        self._sampler = Sampler(device)
        self._steps = self._decode_steps = self._decode_rows = 0
        self._computed = self._cached = self._emitted = self._preemptions = 0

    # ---- between steps --------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue it. The caller checked that it fits alone."""
        self.batcher.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """It is over here: every block it holds, in whatever state, is given back."""
        self.batcher.remove(sequence)
        self.pool.release(sequence.ticket)
        self.pool.release(sequence.owner)
        self._sampler.forget(sequence)

    def join(self, sequence: Sequence, first_token: int) -> None:
        """A hand-off's blocks are all here: the sequence decodes from its first token on."""
        if self.pool.kind(sequence.ticket):
            self.pool.commit(sequence.ticket, sequence.owner)
        sequence.computed = sequence.prompt_length
        self._name_full_blocks(sequence)
        sequence.accept(first_token)
        self.batcher.join(sequence)

    def pack(self, source: KvSource, count: int, out: Tensor | None = None) -> Tensor:
        """`count` granules of these blocks: [bytes] uint8 in the wire's numbers, in `out` if it can be."""
        return read_granules(self.arena, source, count, out)

    def unpack(
        self, blocks: SequenceOf[BlockId], first: int, count: int, leg: KvLeg, wire: Wire, packed: Tensor
    ) -> None:
        """Granules [first, first + count) of a prompt in `blocks` come from elsewhere. Nothing reads them yet."""
        granules = locate_granules(self.arena, blocks, first, count)
        at = leg.first_head - self.layout.heads.start
        kernels.unpack_granules(self.arena, granules, slice(at, at + leg.heads), wire, packed.to(self._device))

    @property
    def has_work(self) -> bool:
        return self.batcher.has_work

    # ---- a step -----------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """Plan and execute."""
        return self.execute(self.plan())

    def plan(self) -> StepPlan:
        """Who computes what next; their blocks are reserved from now on."""
        plan = self.batcher.plan()
        self._preemptions += len(plan.preempted)
        self._cached += sum(sequence.cached_tokens for sequence in plan.admitted if sequence.admissions == 1)
        return plan

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the batch. A plan without tokens is done at once."""
        if not plan.decodes and not plan.chunks:
            return StepResult(plan=plan, sampled=(), failed=())
        ready = [*plan.decodes, *(work.sequence for work in plan.chunks if work.count == work.sequence.remaining)]
        scored = [scored for work in plan.chunks if (scored := _scored(work))]
        logits = self._model.forward(self._batch(plan, ready, scored), self.arena)
        self._steps += 1
        self._decode_steps += bool(plan.decodes)
        self._decode_rows += len(plan.decodes)
        for work in (*(Work(sequence, sequence.computed, 1) for sequence in plan.decodes), *plan.chunks):
            self._advance(work)
        first = len(ready)
        for sequence, start, count in scored:
            score_prompt(sequence, start, logits.values[first : first + count])
            first += count
        chosen = self._sampler.choose(ready, logits.first(len(ready)))
        for sequence, error in chosen.failed:
            if isinstance(error, Internal):
                self._scrub(sequence)
        self._emitted += len(chosen.sampled)
        return StepResult(plan=plan, sampled=chosen.sampled, failed=chosen.failed)

    def _advance(self, work: Work) -> None:
        sequence = work.sequence
        of_prompt = max(0, min(work.start + work.count, sequence.prompt_length) - work.start)
        sequence.computed_tokens += of_prompt
        self._computed += of_prompt
        sequence.computed += work.count
        self._name_full_blocks(sequence)

    def _name_full_blocks(self, sequence: Sequence) -> None:
        if sequence.full_blocks <= sequence.named:
            return
        names = sequence.names()
        for index in range(sequence.named, sequence.full_blocks):
            self.pool.name(sequence.blocks[index], names[index], sequence.owner)
        sequence.named = sequence.full_blocks

    def _scrub(self, sequence: Sequence) -> None:
        """Masked positions are read: a block with an infinity must not stay behind in the pool."""
        blocks = list(sequence.blocks)
        self.drop(sequence)
        self.pool.clear()
        in_use = {block for owner in self.pool.owners() for block in self.pool.blocks_of(owner)}
        for block in blocks:
            # A block that others share they share for its content: they fail on their own.
            if block not in in_use:
                self.arena[block].zero_()

    def _batch(self, plan: StepPlan, ready: list[Sequence], scored: list[Work]) -> Batch:
        # Attention visits split j for the rows that reach it: longest first.
        decodes = sorted(plan.decodes, key=lambda sequence: -len(sequence.tokens))
        tokens: list[int] = []
        segments: list[kernels.Segment] = []
        first_rows: dict[Sequence, int] = {}
        last_rows: dict[Sequence, int] = {}
        for sequence, start, count in (*(Work(each, each.computed, 1) for each in decodes), *plan.chunks):
            first_rows[sequence] = len(tokens)
            tokens += sequence.tokens[start : start + count]
            last_rows[sequence] = len(tokens) - 1
            segments.append(kernels.Segment(start, count, sequence.blocks))
        wanted = [last_rows[sequence] for sequence in ready]
        for sequence, _, count in scored:
            wanted += range(first_rows[sequence], first_rows[sequence] + count)
        return Batch(tokens=tokens, segments=segments, decode_rows=len(decodes), wanted=wanted)

    # ---- what it says of itself -----------------------------------------------------------------------

    def load(self) -> Load:
        """As of now."""
        waiting = self.batcher.waiting
        running = self.batcher.running
        return Load(
            waiting_requests=len(waiting),
            waiting_tokens=sum(s.remaining for s in waiting if s.task != "decode")
            + sum(s.remaining for s in running if s.remaining > 1),
            running_requests=len(running),
            blocks_free=self.pool.free,
            blocks_cached=self.pool.cached,
            blocks_held=self.pool.held,
            blocks_granted=self.pool.granted,
            blocks_lent=self.pool.lent,
        )

    def counters(self) -> Counters:
        """The engine's part; the roles add theirs."""
        return Counters(
            steps=self._steps,
            decode_steps=self._decode_steps,
            decode_rows=self._decode_rows,
            prompt_tokens_computed=self._computed,
            prompt_tokens_cached=self._cached,
            tokens_emitted=self._emitted,
            preemptions=self._preemptions,
        )


def _scored(work: Work) -> Work | None:
    """The part of a chunk whose logits are about the prompt itself: the last token's are about the answer."""
    if not work.sequence.scores_prompt:
        return None
    end = min(work.start + work.count, work.sequence.prompt_length - 1)
    return Work(work.sequence, work.start, end - work.start) if end > work.start else None
