"""The decode role: owns a request from its submission to its last token.

Runs on the engine's thread. A prompt's KV comes from a prefill worker or is computed here; when a
hand-off ends in any way but a commit, it is computed here too, and the answer goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from diptych.errors import Draining, EngineBroke, LayoutMismatch, Rejected, ServingError, TransferFailed, WorkerLost
from diptych.hashing import granules_per_block
from diptych.types import (
    Failure,
    How,
    KvTicket,
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
from workers.borrowing import Borrower
from workers.engine.batching import StepPlan
from workers.engine.engine import Engine, StepResult
from workers.engine.sampling import Sampled
from workers.engine.sequence import Sequence
from workers.peers import Effects
from workers.tombstones import Tombstones
from workers.transfer.receiving import Inbound, Receiver, granules_of
from workers.transfer.states import State, Tally, Transfer

Key = tuple[RequestId, int]
GrantReply = Callable[[KvTicket | None], None]


@dataclass(slots=True, eq=False)
class _Handoff:
    """A prompt's KV on its way here."""

    prefill: WorkerId
    inbound: Inbound
    reply: GrantReply | None = None
    """Prefill waits for its ticket."""
    done: PrefillDone | None = None

    @property
    def transfer(self) -> Transfer:
        return self.inbound.transfer


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
    bytes_received: int = 0
    kv_seconds: float = 0.0
    kv_wait_seconds: float = 0.0
    spoke: bool = False
    """A token of it was sampled here."""


@dataclass(slots=True)
class DecodeCounters:
    finished: int = 0
    cancelled: int = 0
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
        self, engine: Engine, spec: WorkerSpec, effects: Effects, receiver: Receiver, borrower: Borrower
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._effects = effects
        self._receiver = receiver
        self._borrower = borrower
        self._answers: dict[Key, _Answer] = {}
        self._by_sequence: dict[Sequence, _Answer] = {}
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
        if placement.prefill is not None:
            self._hand_over(answer, placement.prefill, placement.prefix_from)
        elif placement.prefix_from:
            self._borrower.borrow(request, attempt, placement.prefix_from, lambda: self._engine.add(sequence))
        else:
            self._engine.add(sequence)

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

    def renew(self, request: RequestId, attempt: int) -> None:
        """Prefill still waits for its ticket."""
        answer = self._answers.get((request, attempt))
        if answer and answer.handoff:
            self._receiver.touch(answer.handoff.inbound)

    def transfer_failed(self, request: RequestId, attempt: int, reason: str) -> None:
        """The sender gave up."""
        answer = self._answers.get((request, attempt))
        if answer and answer.handoff:
            self._recover(answer, State.FAILED, reason, in_doubt=True)

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

    def hand_back(self, reason: str) -> int:
        """Every front is told to go on elsewhere; what was computed stays in the cache. How many answers that were."""
        answers = list(self._answers.values())
        for answer in answers:
            error = Draining(f"{answer.request.id}: {reason}")
            self._effects.emit(answer.request.front, Failure(answer.request.id, answer.attempt, error))
            self._end(answer, reason)
        return len(answers)

    def fail_all(self, reason: str, suspects: Collection[Sequence]) -> None:
        """The engine broke in a step of the suspects: every front goes on elsewhere."""
        for answer in self._answers.values():
            kind = EngineBroke if answer.sequence in suspects else WorkerLost
            error = kind(f"{answer.request.id}: {reason}")
            self._effects.emit(answer.request.front, Failure(answer.request.id, answer.attempt, error))

    def owners(self) -> set[str]:
        """Who may hold blocks on behalf of this role."""
        sequences = [answer.sequence for answer in self._answers.values()]
        return {name for sequence in sequences for name in (sequence.owner, sequence.ticket)}

    # ---- an answer ----------------------------------------------------------------------------------------

    def _sequence(self, request: Request, attempt: int, arrival: int, *, remote: bool) -> Sequence:
        return Sequence(
            request=request,
            attempt=attempt,
            task="decode" if remote else "answer",
            arrival=arrival,
            block_size=self._engine.limits.block_size,
        )

    def _hand_over(self, answer: _Answer, prefill: WorkerId, prefix_from: WorkerId | None) -> None:
        transfer = TransferId(f"{answer.request.id}#{answer.attempt}>{self._spec.id}")
        inbound = Inbound(
            Transfer(transfer, self.counters.tally),
            prefill,
            progressed=lambda: self._try_commit(answer),
            failed=lambda how, reason: self._recover(answer, how, reason),
        )
        answer.handoff = _Handoff(prefill, inbound)
        self._receiver.begin(inbound)
        order = PrefillOrder(
            request=answer.request, attempt=answer.attempt, decode=self._spec.id, prefix_from=prefix_from
        )
        request, attempt = answer.request.id, answer.attempt
        self._effects.wait(
            prefill,
            lambda peer: peer.run(order),
            lambda peer: peer.is_pending(request, attempt),
            lambda done: self._prefilled(answer, done),
        )

    def _write_ticket(self, answer: _Answer) -> None:
        handoff, sequence = answer.handoff, answer.sequence
        assert handoff is not None, "room is only given to a hand-off"
        assert handoff.reply is not None, "room is only given to a hand-off that asked"
        try:
            ticket = self._receiver.promise(
                handoff.inbound,
                answer.request.id,
                answer.attempt,
                owner=sequence.ticket,
                blocks=sequence.blocks,
                first=sequence.named * granules_per_block(sequence.block_size),
                granules=granules_of(sequence.prompt_length),
            )
        except (LayoutMismatch, TransferFailed) as error:
            self._recover(answer, State.FAILED, str(error))
            return
        reply, handoff.reply = handoff.reply, None
        reply(ticket)
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
            # This word may overtake `transfer_failed`: whatever broke under a ticket, its pair is in doubt.
            self._recover(answer, State.FAILED, str(done), in_doubt=True)
            return
        if done.first.finish:  # prefill spoke the first and last token
            self.counters.finished += 1
            self._end(answer, "ended at its first token", tell_prefill=False)
            return
        handoff.done = done
        answer.computed_elsewhere, answer.cached_elsewhere = done.computed_tokens, done.cached_tokens
        self._receiver.computed(handoff.inbound)
        self._try_commit(answer)

    def _try_commit(self, answer: _Answer) -> None:
        handoff = answer.handoff
        if handoff is None or handoff.done is None or not handoff.inbound.is_complete:
            return
        promise = handoff.inbound.promise
        assert promise is not None, "only what was promised can be complete"
        handoff.transfer.advance(State.LANDED)
        handoff.transfer.advance(State.COMMITTED)
        answer.blocks_received, answer.bytes_received = len(promise.generations), promise.nbytes
        self._effects.emit(answer.request.front, handoff.done.first)
        self._engine.join(answer.sequence, handoff.done.first.token)
        if sample := self._receiver.committed(handoff.inbound):
            answer.kv_seconds, answer.kv_wait_seconds = sample.seconds, sample.exposed_seconds
        transfer = handoff.transfer.id
        self._effects.call(handoff.prefill, lambda peer: peer.committed(transfer))
        handoff.transfer.advance(State.RELEASED)
        self._receiver.end(handoff.inbound)
        answer.handoff = None

    def _recover(self, answer: _Answer, how: State, reason: str, *, in_doubt: bool = False) -> None:
        """No commit: what was promised is void, and the prompt is computed here."""
        handoff = answer.handoff
        if handoff is None or not handoff.transfer.end(how, reason):
            return
        if handoff.reply:
            handoff.reply(None)
        request, attempt = answer.request.id, answer.attempt
        self._effects.call(handoff.prefill, lambda peer: peer.withdraw(request, attempt))
        answer.handoff = None
        self._receiver.end(handoff.inbound, in_doubt=in_doubt, reason=reason)
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
            kv_bytes_sent=answer.bytes_received,
            kv_seconds=answer.kv_seconds,
            kv_wait_seconds=answer.kv_wait_seconds,
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
            self._receiver.end(handoff.inbound)
            answer.handoff = None
        self._borrower.cancel(answer.request.id, answer.attempt)
        del self._answers[answer.request.id, answer.attempt]
        del self._by_sequence[answer.sequence]
        self._engine.drop(answer.sequence)
