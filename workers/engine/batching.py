"""Who computes what in the next step. Knows sequences and blocks; not tensors or the network.

Continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi-Serve, Agrawal et al.
2024): every running sequence decodes one token, and what is left of the step's token budget goes
to prompts in order.

Order is the whole policy: by priority, then by arrival. Who comes first in it is admitted first,
gets its next block first and is preempted last. The first sequence can always preempt all others,
so it always ends, and then the next one is the first: nothing deadlocks, as long as each fits
alone, and within one priority nothing starves. Nor does it across priorities: when MOST_OVERTAKES
more important ones that came later were admitted before the one that came first, that one goes
before all others from then on. So a request waits for at most MOST_OVERTAKES + 1 admissions for
each that came before it, and importance keeps all but one in so many. Importance alone preempts
nobody: who runs gives way when blocks run out, not because a more important one waits.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from workers.engine.blocks import BlockPool
from workers.engine.sequence import Sequence

SCORED_TOKENS = 256
"""Prompt tokens in a step whose logits are kept, all of a vocabulary each: they bound its memory."""

MOST_OVERTAKES = 16
"""Of the longest waiting by more important ones, one after the other."""

_by_turn = attrgetter("turn")
_by_arrival = attrgetter("arrival")


class Work(NamedTuple):
    """Tokens [start, start + count) of a sequence."""

    sequence: Sequence
    start: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step computes, and who had to give way for it."""

    decodes: tuple[Sequence, ...]
    chunks: tuple[Work, ...]
    admitted: tuple[Sequence, ...]
    """Those that compute here from now on, again after a preemption included."""
    granted: tuple[Sequence, ...]
    """Hand-offs that got their room: their tickets can be written."""
    preempted: tuple[Sequence, ...]

    @property
    def computing(self) -> tuple[Sequence, ...]:
        """Everyone with a token in this step. A prompt's last token alone counts as a decode."""
        return (*self.decodes, *(work.sequence for work in self.chunks))


class Batcher:
    """Waiting and running sequences of one engine, in order."""

    def __init__(self, pool: BlockPool, *, block_size: int, max_batch_tokens: int, max_running: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self.limit(max_batch_tokens)
        self._max_running = max_running
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._granted: list[Sequence] = []
        self._overtakes = 0

    def limit(self, max_batch_tokens: int) -> None:
        """Tokens of a step from now on; at least a block."""
        self._max_batch_tokens = max(max_batch_tokens, self._block_size)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running)

    @property
    def granted(self) -> tuple[Sequence, ...]:
        """Hand-offs with blocks whose KV is not here yet."""
        return tuple(self._granted)

    @property
    def has_work(self) -> bool:
        """Whether `plan` could find something to do."""
        return bool(self._running) or bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """To the queue, at its place."""
        bisect.insort(self._waiting, sequence, key=_by_turn)

    def join(self, sequence: Sequence) -> None:
        """A hand-off is complete: the sequence decodes from the next step on."""
        self._granted.remove(sequence)
        bisect.insort(self._running, sequence, key=_by_turn)

    def remove(self, sequence: Sequence) -> None:
        """It ended, was cancelled or goes on elsewhere. Its blocks are the caller's to release."""
        for place in (self._running, self._waiting, self._granted):
            if sequence in place:
                place.remove(sequence)

    def plan(self) -> StepPlan:
        """Reserves the blocks of what it returns."""
        preempted: list[Sequence] = []
        for sequence in tuple(self._running):  # most important first, then oldest
            if not preempted or sequence in self._running:
                self._make_room(sequence, preempted)
        admitted = [] if preempted else self._admit()
        decodes = [sequence for sequence in self._running if sequence.remaining == 1]
        budget = self._max_batch_tokens - len(decodes)
        scoring = SCORED_TOKENS
        chunks: list[Work] = []
        for sequence in self._running:
            room = min(budget, scoring) if sequence.scores_prompt else budget
            if sequence.remaining > 1 and (count := self._chunk(sequence, room, first=not chunks)):
                chunks.append(Work(sequence, sequence.computed, count))
                budget -= count
                scoring -= count if sequence.scores_prompt else 0
        return StepPlan(
            decodes=tuple(decodes),
            chunks=tuple(chunks),
            admitted=tuple(sequence for sequence in admitted if sequence.task != "decode"),
            granted=tuple(sequence for sequence in admitted if sequence.task == "decode"),
            preempted=tuple(preempted),
        )

    def _chunk(self, sequence: Sequence, budget: int, *, first: bool) -> int:
        """How much of the prompt fits. Whole blocks, unless it is the end: a block is sent whole.

        The first prompt gets at least a block, however many sequences decode.
        """
        if sequence.remaining <= budget:
            return sequence.remaining
        room = max(budget, self._block_size if first else 0)
        end = (sequence.computed + room) // self._block_size * self._block_size
        return max(0, min(end - sequence.computed, sequence.remaining))

    def _make_room(self, sequence: Sequence, preempted: list[Sequence]) -> None:
        """A block for the sequence's next token; the last in order gives way, if need be the sequence itself."""
        if len(sequence.tokens) <= len(sequence.blocks) * self._block_size:
            return
        while (blocks := self._pool.take(1, sequence.owner)) is None:
            victim = self._running[-1]
            self._running.remove(victim)
            self._pool.release(victim.owner)
            victim.restart()
            self.add(victim)
            preempted.append(victim)
            if victim is sequence:
                return
        sequence.blocks += blocks

    def _admit(self) -> list[Sequence]:
        """In order, as long as there is room.

        A prompt is admitted when the step has tokens for it: blocks that wait for their turn are
        no use, and by then an earlier prompt may have left its prefix in the cache.
        """
        admitted: list[Sequence] = []
        if self._overtakes >= MOST_OVERTAKES:
            self._promote_oldest()
        tokens = self._max_batch_tokens - sum(sequence.remaining for sequence in self._running)
        if all(sequence.remaining == 1 for sequence in self._running):
            tokens = max(tokens, self._block_size)  # what the first prompt gets however many decode
        for sequence in tuple(self._waiting):
            if len(self._running) + len(self._granted) >= self._max_running:
                break
            if tokens <= 0 and sequence.task != "decode":
                continue  # it waits for its turn, not for blocks: hand-offs behind it take none of that
            if not self._reserve(sequence):
                break
            self._waiting.remove(sequence)
            self._count_overtake(sequence)
            sequence.admissions += 1
            admitted.append(sequence)
            if sequence.task == "decode":
                self._granted.append(sequence)
            else:
                bisect.insort(self._running, sequence, key=_by_turn)
                tokens -= sequence.remaining
        return admitted

    def _count_overtake(self, admitted: Sequence) -> None:
        """Whether it is more important than who has waited for longest, and came later."""
        oldest = min(self._waiting, key=_by_arrival, default=admitted)
        if oldest.arrival >= admitted.arrival:
            self._overtakes = 0
        elif admitted.turn < oldest.turn:
            self._overtakes += 1

    def _promote_oldest(self) -> None:
        """It goes before all who weren't, and gives way after them."""
        self._overtakes = 0
        oldest = min(self._waiting, key=_by_arrival, default=None)
        if oldest is not None and not oldest.promoted:
            self._waiting.remove(oldest)
            oldest.promoted = True
            self.add(oldest)

    def _reserve(self, sequence: Sequence) -> bool:
        """Cached blocks and new ones for all its tokens so far, or nothing."""
        pool, names = self._pool, sequence.reusable_names()
        needed = -(-len(sequence.tokens) // self._block_size)
        # One block to spare for each running sequence, or it would be preempted within 16 tokens.
        spare = len(self._running)
        if needed - pool.match(names) + spare > pool.available:
            return False
        cached = pool.acquire(names, sequence.owner)
        missing = needed - len(cached)
        remote = sequence.task == "decode"
        fresh = pool.grant(missing, sequence.ticket) if remote else pool.take(missing, sequence.owner)
        if fresh is None:
            pool.release(sequence.owner)
            return False
        sequence.blocks = cached + fresh
        sequence.named = len(cached)
        sequence.computed = len(cached) * self._block_size
        if not sequence.admissions:
            sequence.cached_tokens = min(sequence.computed, sequence.answer_start)
        return True
