"""The decode role: owns a request from its submission to its last token.

Runs on the engine's thread. A prompt's KV comes from a prefill worker or is computed here; when a
hand-off ends in any way but a commit, it is computed here too, and the answer goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diptych.errors import Internal, Rejected, ServingError, TransferFailed, WorkerLost
from diptych.types import (
    Failure,
    How,
    KvParcel,
    KvTicket,
    PairAddress,
    Placement,
    PrefillDone,
    PrefillOrder,
    Request,
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
from workers.transfer.link import MeetingPlace, PairLink
from workers.transfer.pair import ReceiverPair
from workers.transfer.states import State, Tally, Transfer

Key = tuple[RequestId, int]
GrantReply = Callable[[KvTicket | None], None]


@dataclass(slots=True, eq=False)
class _Handoff:
    """A prompt's KV on its way here."""

    prefill: WorkerId
    transfer: Transfer
    reply: GrantReply | None = None
    """Prefill waits for its ticket."""
    ticket: KvTicket | None = None
    landed: int = 0
    """Blocks that are here."""
    done: PrefillDone | None = None
    deadline: float = float("inf")


@dataclass(slots=True, eq=False)
class _Answer:
    """One request this worker owns."""

    request: Request
    attempt: int
    how: How
    sequence: Sequence
    handoff: _Handoff | None
    prefill_worker: str
    computed_elsewhere: int = 0
    cached_elsewhere: int | None = None
    blocks_received: int = 0
    spoke: bool = False
    """A token of it was sampled here."""


@dataclass(slots=True)
class DecodeCounters:
    blocks_received: int = 0
    bytes_received: int = 0
    finished: int = 0
    cancelled: int = 0
    corrupt_parcels: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def committed(self) -> int:
        """Hand-offs that are in use or were."""
        return self.tally.ended(State.RELEASED)

    @property
    def failed(self) -> int:
        """Hand-offs that were recovered from."""
        return self.tally.ended(State.FAILED) + self.tally.ended(State.EXPIRED)


class DecodeRole:
    """Requests of fronts, by id and attempt."""

    def __init__(
        self, engine: Engine, spec: WorkerSpec, effects: Effects, post: Callable[..., None], place: MeetingPlace
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._effects = effects
        self._post = post
        self._place = place
        self._verifier = Verifier(spec.verify, spec.secret)
        self._answers: dict[Key, _Answer] = {}
        self._by_sequence: dict[Sequence, _Answer] = {}
        self._by_transfer: dict[TransferId, _Answer] = {}
        self._pairs: dict[WorkerId, ReceiverPair] = {}
        self._epochs: dict[WorkerId, int] = {}
        self._tombstones = Tombstones()
        self.counters = DecodeCounters()

    # ---- what fronts say ----------------------------------------------------------------------------

    def submit(self, request: Request, attempt: int, placement: Placement, arrival: int) -> None:
        """Own it from here. The caller checked that it fits alone."""
        key = (request.id, attempt)
        if key in self._tombstones or key in self._answers:
            return
        sequence = self._sequence(request, attempt, arrival, remote=placement.prefill is not None)
        answer = _Answer(request, attempt, placement.how, sequence, None, placement.prefill or self._spec.id)
        self._answers[key] = self._by_sequence[sequence] = answer
        if placement.prefill is None:
            self._engine.add(sequence)
        else:
            self._hand_over(answer, placement.prefill)

    def owns(self, request: RequestId, attempt: int) -> bool:
        """For any thread."""
        return (request, attempt) in self._answers

    def cancel(self, request: RequestId, attempt: int) -> None:
        """Idempotent; one that overtakes its submission leaves a tombstone."""
        answer = self._answers.get((request, attempt))
        if answer is None:
            self._tombstones.add(request, attempt)
            return
        self.counters.cancelled += 1
        self._end(answer, "cancelled")

    def cancel_all(self, front: str) -> None:
        """The front is gone, and with it everyone who could read its answers."""
        for answer in [answer for answer in self._answers.values() if answer.request.front == front]:
            self.cancel(answer.request.id, answer.attempt)

    # ---- what prefill workers say ---------------------------------------------------------------------

    def grant(self, request: RequestId, attempt: int, reply: GrantReply) -> None:
        """Queue for room; the ticket is written when the batcher gives it."""
        answer = self._answers.get((request, attempt))
        handoff = answer.handoff if answer else None
        if answer is None or handoff is None or handoff.reply or handoff.transfer.state is not State.NEW:
            reply(None)
            return
        handoff.reply = reply
        self._engine.add(answer.sequence)

    def expect(self, sender: WorkerId, parcel: KvParcel) -> None:
        """Receive it whatever became of its ticket: the pair's order must hold.

        The one method for any thread: a receive that waited for a step would stall the sender.
        """
        self._post(self._announced, parcel)  # first: it must not overtake the landing
        pair = self._pairs.get(sender)
        if pair is not None and pair.address.epoch == parcel.epoch:
            pair.expect(parcel)

    def _announced(self, parcel: KvParcel) -> None:
        answer = self._by_transfer.get(parcel.transfer)
        handoff = answer.handoff if answer else None
        if handoff is None or handoff.transfer.state not in (State.GRANTED, State.SENDING):
            return  # it is over, or said twice
        handoff.transfer.advance(State.SENDING)
        self._touch(handoff)

    def landed(self, parcel: KvParcel, packed: Tensor) -> None:
        """A parcel's bytes are here, in a buffer that is the ticket's alone."""
        answer = self._by_transfer.get(parcel.transfer)
        handoff = answer.handoff if answer else None
        if answer is None or handoff is None or handoff.ticket is None:
            return  # its ticket is over: the bytes are dropped
        ticket = handoff.ticket
        blocks = ticket.blocks[parcel.first : parcel.first + parcel.count]
        problem = self._problem(answer, ticket, parcel, packed)
        if problem:
            self.counters.corrupt_parcels += 1
            self._recover(answer, State.FAILED, problem)
            return
        self._engine.unpack(blocks, packed)
        self.counters.blocks_received += parcel.count
        self.counters.bytes_received += parcel.nbytes
        handoff.landed += parcel.count
        self._touch(handoff)
        self._try_commit(answer)

    def transfer_failed(self, request: RequestId, attempt: int, reason: str) -> None:
        """The sender gave up."""
        answer = self._answers.get((request, attempt))
        if answer and answer.handoff:
            self._doubt(answer, answer.handoff, State.FAILED, reason)

    def peer_left(self, prefill: WorkerId) -> None:
        """It died: its hand-offs are computed here, and whoever takes its name gets a new pair."""
        for answer in list(self._by_transfer.values()):
            if answer.handoff and answer.handoff.prefill == prefill:
                self._recover(answer, State.FAILED, f"{prefill} left")
        self._retire_pair(prefill, f"{prefill} left")

    # ---- around a step ----------------------------------------------------------------------------------

    def before_step(self, plan: StepPlan) -> None:
        """Hand-offs that got their room."""
        for sequence in plan.granted:
            if answer := self._by_sequence.get(sequence):
                self._write_ticket(answer)

    def after_step(self, result: StepResult) -> None:
        for sampled in result.sampled:
            if answer := self._by_sequence.get(sampled.sequence):
                self._emit(answer, sampled)
        for sequence, error in result.failed:
            if answer := self._by_sequence.get(sequence):
                self._effects.emit(answer.request.front, Failure(answer.request.id, answer.attempt, error))
                self._end(answer, str(error))

    def tick(self) -> None:
        """Leases that ran out."""
        now = self._effects.now()
        reason = f"no progress for {self._spec.lease_seconds} s"
        for answer in list(self._by_transfer.values()):
            if answer.handoff and answer.handoff.deadline <= now:
                self._doubt(answer, answer.handoff, State.EXPIRED, reason)

    def fail_all(self, reason: str) -> None:
        """The engine broke: every front hears of it."""
        for answer in self._answers.values():
            error = Internal(f"{answer.request.id}: {reason}")
            self._effects.emit(answer.request.front, Failure(answer.request.id, answer.attempt, error))

    def owners(self) -> set[str]:
        """Who may hold blocks on behalf of this role."""
        sequences = [answer.sequence for answer in self._answers.values()]
        return {name for sequence in sequences for name in (sequence.owner, sequence.ticket)}

    def close(self) -> None:
        for pair in self._pairs.values():
            pair.close()
        for pair in self._pairs.values():
            pair.wait_closed(self._spec.lease_seconds)

    # ---- an answer ----------------------------------------------------------------------------------------

    def _sequence(self, request: Request, attempt: int, arrival: int, *, remote: bool) -> Sequence:
        return Sequence(
            request=request,
            attempt=attempt,
            task="decode" if remote else "answer",
            arrival=arrival,
            block_size=self._engine.limits.block_size,
        )

    def _hand_over(self, answer: _Answer, prefill: WorkerId) -> None:
        transfer = TransferId(f"{answer.request.id}#{answer.attempt}>{self._spec.id}")
        answer.handoff = _Handoff(prefill, Transfer(transfer, self.counters.tally))
        self._by_transfer[transfer] = answer
        order = PrefillOrder(request=answer.request, attempt=answer.attempt, decode=self._spec.id)
        self._effects.order(prefill, order, lambda done: self._prefilled(answer, done))

    def _write_ticket(self, answer: _Answer) -> None:
        handoff, sequence, pool = answer.handoff, answer.sequence, self._engine.pool
        assert handoff is not None, "room is only given to a hand-off"
        assert handoff.reply is not None, "room is only given to a hand-off that asked"
        blocks = tuple(pool.blocks_of(sequence.ticket))
        handoff.ticket = KvTicket(
            transfer=handoff.transfer.id,
            request=answer.request.id,
            attempt=answer.attempt,
            decode=self._spec.id,
            first=sequence.named,
            blocks=blocks,
            generations=tuple(pool.generation(block) for block in blocks),
            lease_seconds=self._spec.lease_seconds,
            link=self._spec.link,
            address=self._pair(handoff.prefill).address,
        )
        handoff.transfer.advance(State.GRANTED)
        reply, handoff.reply = handoff.reply, None
        reply(handoff.ticket)
        self._touch(handoff)
        self._try_commit(answer)

    def _prefilled(self, answer: _Answer, done: PrefillDone | ServingError) -> None:
        handoff = answer.handoff
        if handoff is None or self._answers.get((answer.request.id, answer.attempt)) is not answer:
            return
        if isinstance(done, Rejected):  # it would be here, too
            self._effects.emit(answer.request.front, Failure(answer.request.id, answer.attempt, done))
            self._end(answer, str(done), tell_prefill=False)
            return
        if isinstance(done, ServingError):
            self._recover(answer, State.FAILED, str(done))
            if isinstance(done, WorkerLost):
                self._retire_pair(handoff.prefill, str(done))
            return
        if done.first.finish:  # prefill spoke the first and last token
            self.counters.finished += 1
            self._end(answer, "ended at its first token", tell_prefill=False)
            return
        handoff.done = done
        answer.computed_elsewhere, answer.cached_elsewhere = done.computed_tokens, done.cached_tokens
        self._touch(handoff)
        self._try_commit(answer)

    def _try_commit(self, answer: _Answer) -> None:
        handoff = answer.handoff
        if handoff is None or handoff.ticket is None or handoff.landed < len(handoff.ticket.blocks):
            return
        handoff.transfer.advance(State.LANDED)
        if handoff.done is None:
            return
        handoff.transfer.advance(State.COMMITTED)
        answer.blocks_received = len(handoff.ticket.blocks)
        self._effects.emit(answer.request.front, handoff.done.first)
        self._engine.join(answer.sequence, handoff.done.first.token)
        transfer = handoff.transfer.id
        self._effects.call(handoff.prefill, lambda peer: peer.committed(transfer))
        handoff.transfer.advance(State.RELEASED)
        self._forget_handoff(answer)

    def _doubt(self, answer: _Answer, handoff: _Handoff, how: State, reason: str) -> None:
        """Whatever broke under a ticket, its pair is in doubt: it is rebuilt."""
        self._recover(answer, how, reason)
        if handoff.ticket:
            self._retire_pair(handoff.prefill, reason)

    def _recover(self, answer: _Answer, how: State, reason: str) -> None:
        """No commit: what was promised is void, and the prompt is computed here."""
        handoff = answer.handoff
        if handoff is None or not handoff.transfer.end(how, reason):
            return
        if handoff.reply:
            handoff.reply(None)
        request, attempt = answer.request.id, answer.attempt
        self._effects.call(handoff.prefill, lambda peer: peer.withdraw(request, attempt))
        self._forget_handoff(answer)
        self._engine.drop(answer.sequence)
        del self._by_sequence[answer.sequence]
        again = self._sequence(answer.request, attempt, answer.sequence.arrival, remote=False)
        answer.how, answer.computed_elsewhere, answer.cached_elsewhere = "local", 0, None
        if handoff.done:  # the client may have this token: it is not chosen again
            self._effects.emit(answer.request.front, handoff.done.first)
            again.accept(handoff.done.first.token)
        answer.sequence = again
        self._by_sequence[again] = answer
        self._engine.add(again)

    def _emit(self, answer: _Answer, sampled: Sampled) -> None:
        request, sequence = answer.request, answer.sequence
        # Also with the first token from here: a front that finds a stop string ends the answer itself.
        first = not answer.spoke
        answer.spoke = True
        served = self._served(answer) if sampled.finish or first else None
        self._effects.emit(request.front, sampled.emission(served))
        if sampled.finish:
            self.counters.finished += 1
            self._end(answer, "finished")
        else:
            assert sequence.generated < request.params.max_tokens, f"{request.id} outlived its max_tokens"

    def _served(self, answer: _Answer) -> Served:
        sequence = answer.sequence
        cached = sequence.cached_tokens if answer.cached_elsewhere is None else answer.cached_elsewhere
        return Served(
            how=answer.how,
            prefill_worker=answer.prefill_worker if answer.how == "remote" else self._spec.id,
            decode_worker=self._spec.id,
            prompt_tokens_computed=answer.computed_elsewhere + sequence.computed_tokens,
            cached_tokens=cached,
            kv_blocks_sent=answer.blocks_received,
            kv_bytes_sent=answer.blocks_received * self._engine.layout.block_bytes,
        )

    def _end(self, answer: _Answer, reason: str, *, tell_prefill: bool = True) -> None:
        """Its blocks are free within this step, on both sides."""
        handoff = answer.handoff
        if handoff is not None:
            handoff.transfer.end(State.ABORTED, reason)
            if handoff.reply:
                handoff.reply(None)
            if tell_prefill:
                request, attempt = answer.request.id, answer.attempt
                self._effects.call(handoff.prefill, lambda peer: peer.withdraw(request, attempt))
            self._forget_handoff(answer)
        del self._answers[answer.request.id, answer.attempt]
        del self._by_sequence[answer.sequence]
        self._engine.drop(answer.sequence)

    def _forget_handoff(self, answer: _Answer) -> None:
        assert answer.handoff is not None
        del self._by_transfer[answer.handoff.transfer.id]
        answer.handoff = None

    def _touch(self, handoff: _Handoff) -> None:
        """Something moved. The lease only runs while the next move is the link's or the peer's engine's."""
        if handoff.done is not None or handoff.transfer.state is State.SENDING:
            handoff.deadline = self._effects.now() + self._spec.lease_seconds

    # ---- pairs ------------------------------------------------------------------------------------------------

    def _problem(self, answer: _Answer, ticket: KvTicket, parcel: KvParcel, packed: Tensor) -> str | None:
        """Why this parcel must not land; None when it may."""
        blocks = ticket.blocks[parcel.first : parcel.first + parcel.count]
        promised = ticket.generations[parcel.first : parcel.first + parcel.count]
        pool = self._engine.pool
        if len(blocks) != parcel.count or packed.numel() != parcel.count * self._engine.layout.block_bytes:
            return f"parcel {parcel.sequence} does not fit its ticket"
        if parcel.first != (answer.handoff.landed if answer.handoff else -1):
            return f"parcel {parcel.sequence} came out of order"
        if pool.kind(answer.sequence.ticket) != "ticket" or promised != tuple(map(pool.generation, blocks)):
            return "its blocks were given away"
        if not self._verifier.agrees(packed, parcel.sequence, parcel.checksum):
            return f"parcel {parcel.sequence} is corrupt"
        return None

    def _pair(self, prefill: WorkerId) -> ReceiverPair:
        pair = self._pairs.get(prefill)
        if pair is None:
            epoch = self._epochs[prefill] = self._epochs.get(prefill, 0) + 1
            address = PairAddress(
                host=self._place.host,
                port=self._place.port,
                key=f"{prefill}>{self._spec.id}.{self._spec.epoch}",
                epoch=epoch,
            )
            device = torch.device(self._spec.device)
            link = PairLink(self._spec.link, "receiver", self._spec.host, device, self._spec.lease_seconds)
            pair = self._pairs[prefill] = ReceiverPair(
                link,
                address,
                self._place,
                lambda parcel, packed: self._post(self.landed, parcel, packed),
                lambda error: self._post(self._pair_broken, prefill, address, error),
            )
        return pair

    def _pair_broken(self, prefill: WorkerId, address: PairAddress, error: TransferFailed) -> None:
        pair = self._pairs.get(prefill)
        if pair is not None and pair.address == address:
            self._retire_pair(prefill, str(error))

    def _retire_pair(self, prefill: WorkerId, reason: str) -> None:
        """Its tickets are void, its sender's wait ends at once, and the next ticket opens a new one."""
        pair = self._pairs.pop(prefill, None)
        if pair is None:
            return
        pair.close()
        for answer in list(self._by_transfer.values()):
            if answer.handoff and answer.handoff.ticket and answer.handoff.ticket.address == pair.address:
                self._recover(answer, State.FAILED, reason)
