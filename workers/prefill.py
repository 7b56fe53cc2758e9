"""The prefill role: compute a prompt, send its KV while computing, speak the first token.

Runs on the engine's thread. Knows tickets and parcels; not Ray, and not what decode does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from diptych.errors import ServingError, TransferFailed
from diptych.types import (
    Failure,
    KvParcel,
    KvTicket,
    PairAddress,
    PrefillDone,
    PrefillOrder,
    RequestId,
    Served,
    TransferId,
    WorkerId,
    WorkerSpec,
)
from workers.engine.batching import StepPlan
from workers.engine.engine import Engine, StepResult
from workers.engine.sampling import Sampled
from workers.engine.sequence import Sequence
from workers.peers import Effects
from workers.tombstones import Tombstones
from workers.transfer.checksum import Verifier
from workers.transfer.link import PairLink
from workers.transfer.pair import SenderPair, Shipment
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
    asked: bool = False
    ticket: KvTicket | None = None
    next_block: int = 0
    """The first block of the prompt that was not shipped yet."""
    on_the_way: int = 0
    """Parcels handed to the link and not yet taken."""
    done: bool = False
    blocks_sent: int = 0


@dataclass(slots=True)
class PrefillCounters:
    blocks_sent: int = 0
    bytes_sent: int = 0
    cancelled: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def failed(self) -> int:
        """Hand-offs that ended without a commit, for no wish of the client's."""
        return self.tally.ended(State.FAILED) + self.tally.ended(State.EXPIRED)


class PrefillRole:
    """Orders of decode workers, by request and attempt."""

    def __init__(self, engine: Engine, spec: WorkerSpec, effects: Effects, post: Callable[..., None]) -> None:
        self._engine = engine
        self._spec = spec
        self._effects = effects
        self._post = post
        self._jobs: dict[tuple[RequestId, int], _Job] = {}
        self._by_sequence: dict[Sequence, _Job] = {}
        self._pairs: dict[WorkerId, SenderPair] = {}
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
        job = _Job(order, sequence, Transfer(_transfer_id(order), self.counters.tally), reply, float("inf"))
        self._jobs[key] = self._by_sequence[sequence] = job
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

    def peer_left(self, decode: WorkerId) -> None:
        """It died: nobody waits for its prompts."""
        for job in [job for job in self._jobs.values() if job.order.decode == decode]:
            self._end(job, State.FAILED, f"{decode} left")
        self._retire_pair(decode, f"{decode} left")

    # ---- around a step ------------------------------------------------------------------------------

    def before_step(self, plan: StepPlan) -> None:
        """On dequeue, and not before: room is asked for when it is about to be needed."""
        for sequence in plan.computing:
            job = self._by_sequence.get(sequence)
            if job and not job.asked and job.order.request.params.max_tokens > 1:
                job.asked = True
                request, attempt = job.order.request.id, job.order.attempt
                self._effects.call(
                    job.order.decode,
                    lambda peer, request=request, attempt=attempt: peer.grant(request, attempt),
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
                self._touch(job)
                self._ship(job)

    def tick(self) -> None:
        """Leases that ran out."""
        now = self._effects.now()
        for job in [job for job in self._jobs.values() if job.deadline <= now]:
            self._end(job, State.EXPIRED, f"no progress for {self._spec.lease_seconds} s")

    def owners(self) -> set[str]:
        """Who may hold blocks on behalf of this role."""
        return {job.sequence.owner for job in self._jobs.values()}

    def close(self) -> None:
        for pair in self._pairs.values():
            pair.close()
        for pair in self._pairs.values():
            pair.wait_closed(self._spec.lease_seconds)

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
        if ticket.link != self._spec.link:
            self._fail(job, f"{ticket.decode} receives over {ticket.link}, we send over {self._spec.link}")
            return
        if self._is_stale(ticket):
            self._fail(job, "its pair was rebuilt")
            return
        job.ticket = ticket
        job.next_block = ticket.first
        job.transfer.advance(State.GRANTED)
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
            kv_blocks_sent=job.blocks_sent,
            kv_bytes_sent=job.blocks_sent * self._engine.layout.block_bytes,
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
        """One parcel of the blocks that are complete, granted and not yet sent."""
        ticket, sequence = job.ticket, job.sequence
        if ticket is None or not job.transfer.live:
            return
        ready = sequence.prompt_blocks if job.done else min(sequence.full_blocks, sequence.prompt_blocks)
        blocks = sequence.blocks[job.next_block : ready]
        if blocks:
            job.transfer.advance(State.PACKING)
            packed = self._engine.pack(blocks)
            parcel = KvParcel(
                transfer=ticket.transfer,
                epoch=ticket.address.epoch,
                sequence=0,  # the pair numbers it when it leaves
                first=job.next_block - ticket.first,
                count=len(blocks),
                nbytes=packed.numel(),
            )
            job.next_block = ready
            job.on_the_way += 1
            self._pair(job.order.decode, ticket).ship(self._shipment(job, parcel, packed))
            job.transfer.advance(State.SENDING)
        self._landed_all(job)

    def _shipment(self, job: _Job, parcel: KvParcel, packed: torch.Tensor) -> Shipment:
        assert job.ticket is not None, "only a granted hand-off is sent"
        decode, me, address = job.order.decode, self._spec.id, job.ticket.address

        def announce(parcel: KvParcel) -> None:
            self._effects.call(
                decode, lambda peer: peer.expect(me, parcel), lambda answer: self._announced(decode, address, answer)
            )

        def sent(parcel: KvParcel) -> None:
            self._post(self._sent, job, parcel)

        return Shipment(parcel=parcel, packed=packed, announce=announce, sent=sent)

    def _announced(self, decode: WorkerId, address: PairAddress, answer: ServingError | None) -> None:
        if answer is not None:  # decode doesn't receive: what is sent after it would wait for it
            self._pair_broken(decode, address, answer)

    def _sent(self, job: _Job, parcel: KvParcel) -> None:
        self.counters.blocks_sent += parcel.count
        self.counters.bytes_sent += parcel.nbytes
        job.blocks_sent += parcel.count
        job.on_the_way -= 1
        if job.transfer.live:
            self._touch(job)
            self._landed_all(job)

    def _landed_all(self, job: _Job) -> None:
        if job.done and not job.on_the_way and job.next_block >= job.sequence.prompt_blocks:
            job.transfer.advance(State.LANDED)

    def _is_stale(self, ticket: KvTicket) -> bool:
        """Whether a later ticket of the same decode worker already opened a later pair."""
        pair = self._pairs.get(ticket.decode)
        return pair is not None and pair.address.key == ticket.address.key and pair.address.epoch > ticket.address.epoch

    def _pair(self, decode: WorkerId, ticket: KvTicket) -> SenderPair:
        pair = self._pairs.get(decode)
        if pair and pair.address == ticket.address:
            return pair
        if pair:
            self._retire_pair(decode, "its pair was rebuilt")
        device = torch.device(self._spec.device)
        link = PairLink(self._spec.link, "sender", self._spec.host, device, self._spec.lease_seconds)
        verifier = Verifier(self._spec.verify, self._spec.secret)
        pair = self._pairs[decode] = SenderPair(
            link, ticket.address, verifier, lambda error: self._post(self._pair_broken, decode, ticket.address, error)
        )
        return pair

    def _pair_broken(self, decode: WorkerId, address: PairAddress, error: ServingError) -> None:
        pair = self._pairs.get(decode)
        if pair is not None and pair.address == address:
            self._retire_pair(decode, str(error))

    def _retire_pair(self, decode: WorkerId, reason: str) -> None:
        """Its tickets are void: nothing must open it again."""
        pair = self._pairs.pop(decode, None)
        if pair is None:
            return
        pair.close()
        for job in list(self._jobs.values()):
            if job.ticket is not None and job.ticket.address == pair.address:
                self._fail(job, reason)

    def _fail(self, job: _Job, reason: str) -> None:
        """Tell decode at once: it computes the prompt itself, and withdraws what is left here."""
        request, attempt = job.order.request.id, job.order.attempt
        self._effects.call(job.order.decode, lambda peer: peer.transfer_failed(request, attempt, reason))
        self._end(job, State.FAILED, reason)

    def _touch(self, job: _Job) -> None:
        if job.done or job.ticket is not None:
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
        self._engine.drop(job.sequence)


def _nobody(_: PrefillDone | ServingError) -> None:
    """The order was answered."""


def _transfer_id(order: PrefillOrder) -> TransferId:
    return TransferId(f"{order.request.id}#{order.attempt}>{order.decode}")
