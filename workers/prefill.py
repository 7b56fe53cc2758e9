"""The prefill role: compute a prompt, send its KV while computing, speak the first token.

Runs on the engine's thread. Knows tickets and parcels; not Ray, and not what decode does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from diptych.errors import EngineBroke, ServingError, TransferFailed
from diptych.hashing import GRANULE
from diptych.types import (
    Failure,
    KvTicket,
    PrefillDone,
    PrefillOrder,
    Request,
    RequestId,
    Served,
    TransferId,
    WorkerId,
    WorkerSpec,
)
from workers.borrowing import Borrower
from workers.engine.batching import StepPlan
from workers.engine.engine import Engine, StepResult
from workers.engine.sampling import Sampled
from workers.engine.sequence import Sequence
from workers.peers import Effects
from workers.tombstones import Tombstones
from workers.transfer.receiving import granules_of
from workers.transfer.sending import Outbound, Sender
from workers.transfer.states import State, Tally, Transfer

Reply = Callable[[PrefillDone | ServingError], None]


@dataclass(slots=True, eq=False)
class _Job:
    """One order, from its arrival until its blocks are free again."""

    order: PrefillOrder
    sequence: Sequence
    transfer: Transfer
    reply: Reply
    deadline: float
    outbound: Outbound
    asked: bool = False
    done: bool = False


@dataclass(slots=True)
class PrefillCounters:
    cancelled: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def failed(self) -> int:
        """Hand-offs that ended without a commit, for no wish of the client's."""
        return self.tally.ended(State.FAILED) + self.tally.ended(State.EXPIRED)


class PrefillRole:
    """Orders of decode workers, by request and attempt."""

    def __init__(self, engine: Engine, spec: WorkerSpec, effects: Effects, sender: Sender, borrower: Borrower) -> None:
        self._engine = engine
        self._spec = spec
        self._effects = effects
        self._sender = sender
        self._borrower = borrower
        self._jobs: dict[tuple[RequestId, int], _Job] = {}
        self._by_sequence: dict[Sequence, _Job] = {}
        self._tombstones = Tombstones()
        self.counters = PrefillCounters()

    # ---- what decode workers say ------------------------------------------------------------------

    def run(self, order: PrefillOrder, arrival: int, reply: Reply) -> None:
        """Queue the order. `reply` is called once."""
        key = (order.request.id, order.attempt)
        if key in self._tombstones or key in self._jobs:
            reply(TransferFailed(f"{order.request.id}: the order was withdrawn"))
            return
        tokens, limit = len(order.request.tokens), self._engine.limits.max_context
        if tokens > limit:  # it would wait at the head of the queue for ever
            reply(TransferFailed(f"{order.request.id}: {tokens} prompt tokens, {self._spec.id} holds {limit}"))
            return
        sequence = Sequence(
            request=order.request,
            attempt=order.attempt,
            task="prefill",
            arrival=arrival,
            block_size=self._engine.limits.block_size,
        )
        # The deadline runs from the moment there is something to wait for: see `_touch`.
        transfer = Transfer(_transfer_id(order), self.counters.tally)
        outbound = Outbound(
            transfer,
            order.decode,
            moved=lambda: self._touch(job),
            failed=lambda reason: self._fail(job, reason),
        )
        job = _Job(order, sequence, transfer, reply, float("inf"), outbound)
        self._jobs[key] = self._by_sequence[sequence] = job
        if order.prefix_from:
            self._borrower.borrow(order.request, order.attempt, order.prefix_from, lambda: self._engine.add(sequence))
        else:
            self._engine.add(sequence)

    def withdraw(self, request: RequestId, attempt: int) -> None:
        """Idempotent; one that overtakes its order leaves a tombstone."""
        job = self._jobs.get((request, attempt))
        if job is None:
            self._tombstones.add(request, attempt)
            return
        self.counters.cancelled += 1
        self._end(job, State.ABORTED, "withdrawn")

    def committed(self, transfer: TransferId) -> None:
        """Decode runs on the copy: ours is released."""
        job = next((job for job in self._jobs.values() if job.transfer.id == transfer), None)
        if job is None:
            return
        # It can only commit what it got: that its grant is still on the way here, or that our link
        # thread has not said so yet, is a matter of time.
        if job.transfer.state is State.NEW:
            job.transfer.advance(State.GRANTED)
        job.transfer.advance(State.LANDED)
        job.transfer.advance(State.COMMITTED)
        self._end(job, State.RELEASED)

    def peer_left(self, decode: WorkerId, reason: str) -> None:
        """It died: nobody waits for its prompts."""
        for job in [job for job in self._jobs.values() if job.order.decode == decode]:
            self._end(job, State.FAILED, reason)

    # ---- around a step ------------------------------------------------------------------------------

    def before_step(self, plan: StepPlan) -> None:
        """On dequeue, and not before: room is asked for when it is about to be needed."""
        for sequence in plan.computing:
            job = self._by_sequence.get(sequence)
            if job and not job.asked and _is_handed_over(job.order.request):
                job.asked = True
                request, attempt = job.order.request.id, job.order.attempt
                self._effects.wait(
                    job.order.decode,
                    lambda peer, request=request, attempt=attempt: peer.grant(request, attempt),
                    lambda peer, request=request, attempt=attempt: peer.is_granting(request, attempt),
                    lambda ticket, job=job: self._granted(job, ticket),
                )

    def after_step(self, result: StepResult) -> None:
        """First tokens leave at once; then what was computed goes on the links.

        What failed is ended before: its blocks are not its own any more.
        """
        for sequence, error in result.failed:
            if job := self._by_sequence.get(sequence):
                self._effects.emit(job.order.request.front, Failure(job.order.request.id, job.order.attempt, error))
                self._reply(job, error)
                self._end(job, State.FAILED, str(error))
        for sampled in result.sampled:
            if job := self._by_sequence.get(sampled.sequence):
                self._first_token(job, sampled)
        for sequence in result.plan.computing:
            if job := self._by_sequence.get(sequence):
                if not job.outbound.on_the_way:  # else it is the link that has to move
                    self._touch(job)
                self._ship(job)

    def tick(self) -> None:
        """Leases that ran out."""
        now = self._effects.now()
        for job in [job for job in self._jobs.values() if job.deadline <= now]:
            self._end(job, State.EXPIRED, f"no progress for {self._spec.lease_seconds} s")

    def fail_suspects(self, reason: str, suspects: Collection[Sequence]) -> None:
        """The engine broke in a step of theirs: their fronts count it. The others are decode's to save."""
        for sequence, job in self._by_sequence.items():
            if sequence in suspects:
                request, attempt = job.order.request, job.order.attempt
                self._effects.emit(request.front, Failure(request.id, attempt, EngineBroke(f"{request.id}: {reason}")))

    def owners(self) -> set[str]:
        """Who may hold blocks on behalf of this role."""
        return {job.sequence.owner for job in self._jobs.values()}

    # ---- a job --------------------------------------------------------------------------------------

    def _granted(self, job: _Job, ticket: KvTicket | ServingError | None) -> None:
        if not job.transfer.live:
            return
        if ticket is None:  # given up over there: the word of that may come before or after this
            self.withdraw(job.order.request.id, job.order.attempt)
            return
        if isinstance(ticket, ServingError):
            self._fail(job, f"no room at {job.order.decode}: {ticket}")
            return
        self._sender.accept(job.outbound, ticket)
        self._touch(job)
        self._ship(job)

    def _first_token(self, job: _Job, sampled: Sampled) -> None:
        request, sequence = job.order.request, job.sequence
        job.done = True
        finished = sampled.finish is not None
        served = Served(
            how="remote",
            prefill_worker=self._spec.id,
            decode_worker=job.order.decode,
            prompt_tokens_computed=sequence.computed_tokens,
            cached_tokens=sequence.cached_tokens,
            kv_blocks_sent=job.outbound.blocks_sent,
            kv_bytes_sent=job.outbound.bytes_sent,
        )
        first = sampled.emission(served)
        self._effects.emit(request.front, first)
        computed, cached = sequence.computed_tokens, sequence.cached_tokens
        self._reply(job, PrefillDone(first=first, computed_tokens=computed, cached_tokens=cached))
        if finished:
            self._end(job, State.ABORTED, "ended at its first token")
            return
        self._engine.batcher.remove(sequence)
        self._engine.pool.lend(sequence.owner)
        self._touch(job)

    def _ship(self, job: _Job) -> None:
        sequence = job.sequence
        computed = min(sequence.computed, sequence.prompt_length)
        ready = granules_of(sequence.prompt_length) if job.done else computed // GRANULE
        self._sender.ship(job.outbound, sequence.blocks, ready)

    def _fail(self, job: _Job, reason: str) -> None:
        """Tell decode at once: it computes the prompt itself, and withdraws what is left here."""
        request, attempt = job.order.request.id, job.order.attempt
        self._effects.call(job.order.decode, lambda peer: peer.transfer_failed(request, attempt, reason))
        self._end(job, State.FAILED, reason)

    def _touch(self, job: _Job) -> None:
        # Before there is a ticket we wait for room over there, however long it takes: `Effects.wait` looks after that.
        if job.outbound.ticket is not None:
            job.deadline = self._effects.now() + self._spec.lease_seconds

    def _reply(self, job: _Job, answer: PrefillDone | ServingError) -> None:
        reply, job.reply = job.reply, _nobody
        reply(answer)

    def _end(self, job: _Job, how: State, reason: str = "") -> None:
        if not job.transfer.end(how, reason):
            return
        self._reply(job, TransferFailed(f"{job.order.request.id}: {how.value} {reason}"))
        del self._jobs[job.order.request.id, job.order.attempt]
        del self._by_sequence[job.sequence]
        self._sender.end(job.outbound)
        self._borrower.cancel(job.order.request.id, job.order.attempt)
        self._engine.drop(job.sequence)


def _nobody(_: PrefillDone | ServingError) -> None:
    """The order was answered."""


def _is_handed_over(request: Request) -> bool:
    """Unless the token that prefill speaks is the last."""
    return request.params.max_tokens > request.said + 1


def _transfer_id(order: PrefillOrder) -> TransferId:
    return TransferId(f"{order.request.id}#{order.attempt}>{order.decode}")
