"""A cluster in virtual time: requests arrive, a policy places them, virtual workers serve them.

Knows the life of a request from the front's side; not how a worker computes or a policy decides.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.simulate.asked import Asked, Namer, VirtualSequence
from cluster.simulate.clock import Clock
from cluster.simulate.fleet import worker_info
from cluster.simulate.hand_off import Borrowing, HandOff, Wires
from cluster.simulate.links import Links
from cluster.simulate.run import Kill, Look, RoleChange, Run
from cluster.simulate.worker import VirtualWorker
from diptych.errors import ServingError
from diptych.types import Outcome, Placement, RequestId, WorkerId
from workers.report_pace import HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.simulate.constants import Constants
    from cluster.simulate.policy import Policy
    from cluster.simulate.trace import Trace
    from diptych.types import Report, WorkerInfo


_LOOKS = 240


class VirtualCluster:
    """Runs once."""

    def __init__(
        self,
        trace: Trace,
        constants: Constants,
        policy: Policy,
        *,
        speed: float = 1.0,
        kills: Sequence[Kill] = (),
        is_hopeless: Callable[[Asked], bool] | None = None,
    ) -> None:
        """`is_hopeless` is asked about each request that ended; the run stops at the first yes."""
        self._constants = constants
        self._is_hopeless = is_hopeless
        self._policy = policy
        self._clock = Clock()
        self._wires = Wires(self._clock, Links(constants.link, self._clock), constants.kv_bytes_per_token)
        self._workers: dict[WorkerId, VirtualWorker] = {}
        self._hand_offs: dict[RequestId, HandOff] = {}
        self._on: dict[WorkerId, dict[RequestId, Asked]] = defaultdict(dict)
        """Requests owned by each decode worker."""
        self._turns = 0
        namer = Namer(trace.block_tokens)
        self._asked = {
            asked.id: asked
            for asked in (namer.ask(place, one, one.arrival / speed) for place, one in enumerate(trace.requests))
        }
        self._open = len(self._asked)
        self._looks: list[Look] = []
        self._look_seconds = max(trace.seconds / speed, 1.0) / _LOOKS
        self._next_turn: float | None = None
        self._stopped = False
        self._role_changes: list[RoleChange] = []
        for info in worker_info(constants, trace.block_tokens):
            self._join(info)
        for asked in self._asked.values():
            self._clock.at(asked.arrival, partial(self._submit, asked))
        for kill in kills:
            self._clock.at(kill.at, partial(self._kill, kill))

    def run(self) -> Run:
        """Until every request ended."""
        self._beat()
        self._look()
        self._rescale()
        self._clock.run()
        assert self._stopped or not self._open, f"{self._open} requests never ended"
        workers = tuple(self._workers.values())
        return Run(
            asked=tuple(self._asked.values()),
            workers=tuple(worker.info for worker in workers),
            tokens_emitted=tuple(worker.tokens_emitted for worker in workers),
            busy_seconds=tuple(worker.busy_seconds for worker in workers),
            looks=tuple(self._looks),
            role_changes=tuple(self._role_changes),
            seconds=max((asked.ended or 0.0 for asked in self._asked.values()), default=0.0),
        )

    def check(self) -> None:
        """After `run`: every block is free or cached."""
        for worker in self._workers.values():
            worker.check()

    # ---- from arrival to placement ----------------------------------------------------------------

    def _submit(self, asked: Asked) -> None:
        try:
            placement = self._policy.submit(asked.shape(), self._clock.now)
        except ServingError as error:
            self._end(asked, type(error).__name__)
            return
        if placement:
            self._place(asked, placement)
        self._plan_turn()

    def _advance(self) -> None:
        for request, found in self._policy.advance(self._clock.now):
            asked = self._asked[request]
            if isinstance(found, Placement):
                self._place(asked, found)
            else:
                self._end(asked, type(found).__name__)
        self._plan_turn()

    def _plan_turn(self) -> None:
        """At most one turn is planned, and never a later one than is needed."""
        turn = self._policy.next_turn(self._clock.now) if self._open else None
        if turn is not None and (self._next_turn is None or turn < self._next_turn):
            self._next_turn = turn
            self._clock.at(turn, partial(self._take_turn, turn))

    def _take_turn(self, turn: float) -> None:
        if self._next_turn == turn:
            self._next_turn = None
            self._advance()

    def _place(self, asked: Asked, placement: Placement) -> None:
        asked.placement, asked.placed = placement, self._clock.now
        self._turns += 1
        decode = self._workers[placement.decode]
        self._on[decode.id][asked.id] = asked
        if not decode.alive:
            return  # its front hears of the death and asks again
        if placement.prefill is None:
            self._prepare(asked, decode, asked.sequence("answer", self._turns))
            return
        prefill = self._workers[placement.prefill]
        self._hand_offs[asked.id] = hand_off = HandOff(
            wires=self._wires,
            sender=prefill,
            sending=asked.sequence("prefill", self._turns),
            receiver=decode,
            receiving=asked.sequence("decode", self._turns),
            committed=self._committed,
        )
        if prefill.alive:
            self._prepare(asked, prefill, hand_off.sending)

    def _prepare(self, asked: Asked, computes: VirtualWorker, sequence: VirtualSequence) -> None:
        """Queue the prompt, after the prefix that it borrows."""
        holder = asked.placement.prefix_from if asked.placement else None
        if holder is None or holder == computes.id:
            computes.add(sequence)
            return
        borrowing = Borrowing(
            wires=self._wires,
            holder=self._workers[holder],
            receiver=computes,
            sequence=sequence,
            done=lambda: self._borrowed(asked, computes, borrowing),
        )
        borrowing.begin()

    def _borrowed(self, asked: Asked, computes: VirtualWorker, borrowing: Borrowing) -> None:
        asked.sent_bytes += borrowing.tokens * self._constants.kv_bytes_per_token
        if borrowing.sequence.attempt == asked.attempt and asked.ended is None:
            computes.add(borrowing.sequence)
        else:
            computes.wake()

    # ---- what workers say ---------------------------------------------------------------------------

    def granted(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        self._hand_offs[sequence.asked.id].room_is_there()

    def admitted(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        asked = sequence.asked
        if sequence.admissions == 1 and not asked.attempt and asked.first_token is None:
            asked.cached_tokens = max(asked.cached_tokens, sequence.cached_tokens)
        asked.computed_tokens += sequence.remaining
        if sequence.task == "prefill" and sequence.admissions == 1:
            hand_off = self._hand_offs[asked.id]
            hand_off.receiver.add(hand_off.receiving)

    def computed(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        asked = sequence.asked
        if sequence.generated == 1:
            self._spoke(asked)
        if sequence.task == "prefill":
            self._chunk_is_computed(worker, sequence)
        elif not sequence.wanted:
            self.finished(worker, sequence)

    def _spoke(self, asked: Asked) -> None:
        if asked.first_token is None:
            asked.first_token = self._clock.now
            self._policy.spoke(asked.id, self._clock.now)

    def _chunk_is_computed(self, worker: VirtualWorker, sequence: VirtualSequence) -> None:
        asked = sequence.asked
        hand_off = self._hand_offs[asked.id]
        if not sequence.generated:
            hand_off.send_ready()
            return
        worker.leave(sequence)
        worker.pool.lend(sequence.owner)
        hand_off.computed_at = self._clock.now
        if sequence.wanted:
            hand_off.send_ready()
            return
        hand_off.over = True
        worker.drop(sequence)
        self.finished(hand_off.receiver, hand_off.receiving, tokens=1)

    def _committed(self, hand_off: HandOff) -> None:
        asked = hand_off.receiving.asked
        del self._hand_offs[asked.id]
        asked.sent_bytes += hand_off.sent_bytes
        hand_off.receiver.join(hand_off.receiving)
        hand_off.sender.drop(hand_off.sending)

    def finished(self, worker: VirtualWorker, sequence: VirtualSequence, tokens: int | None = None) -> None:
        asked = sequence.asked
        self._hand_offs.pop(asked.id, None)
        asked.tokens += sequence.generated if tokens is None else tokens
        asked.last_token = self._clock.now
        worker.drop(sequence)
        self._end(asked, "")

    def reported(self, worker: VirtualWorker, report: Report) -> None:
        self._clock.after(self._constants.report_delay_seconds, partial(self._report_arrived, worker, report))

    def _report_arrived(self, worker: VirtualWorker, report: Report) -> None:
        if self._policy.report(report, self._clock.now):
            worker.tell_all()
        if self._open:
            self._advance()

    def _end(self, asked: Asked, error: str) -> None:
        assert asked.ended is None, f"{asked.id} ended twice"
        asked.ended, asked.error = self._clock.now, error
        self._open -= 1
        if asked.placement:
            self._on[asked.placement.decode].pop(asked.id, None)
        placed = asked.arrival if asked.placed is None else asked.placed
        outcome = Outcome(
            request=asked.id,
            queue_seconds=placed - asked.arrival,
            ttft_seconds=None if asked.first_token is None else asked.first_token - placed,
            itl_seconds=asked.itl_seconds,
            tokens=asked.tokens,
            served=None,
            error=error,
        )
        self._policy.finished(outcome, self._clock.now)
        if self._is_hopeless and self._is_hopeless(asked):
            self._stopped = True
            self._clock.stop()

    # ---- workers come and go ------------------------------------------------------------------------

    def _join(self, info: WorkerInfo) -> None:
        self._workers[info.id] = VirtualWorker(info, self._constants, self._clock, self)
        self._policy.join(info, self._clock.now)

    def _kill(self, kill: Kill) -> None:
        worker = self._workers[kill.worker]
        if not worker.alive or not self._open:
            return
        for sequence in worker.die():
            if sequence.task != "prefill":
                sequence.asked.tokens += sequence.generated
        self._clock.after(self._constants.death_seconds, partial(self._mourn, worker))
        back = replace(worker.info, epoch=worker.info.epoch + 1)
        self._clock.after(max(kill.absent_seconds, self._constants.death_seconds), partial(self._join, back))

    def _mourn(self, worker: VirtualWorker) -> None:
        """Its peers and the scheduler know: decode computes what prefill won't, fronts ask again for the rest."""
        self._policy.leave(worker.id, worker.info.epoch, self._clock.now)
        for hand_off in [each for each in self._hand_offs.values() if each.sender is worker]:
            self._recover(hand_off)
        for asked in list(self._on[worker.id].values()):
            self._ask_again(asked)

    def _recover(self, hand_off: HandOff) -> None:
        hand_off.over = True
        sequence, receiver = hand_off.receiving, hand_off.receiver
        del self._hand_offs[sequence.asked.id]
        if receiver.alive:
            receiver.drop(sequence)
            receiver.add(sequence.asked.sequence("answer", sequence.arrival))

    def _ask_again(self, asked: Asked) -> None:
        """The next attempt goes on where the answer broke off."""
        hand_off = self._hand_offs.pop(asked.id, None)
        if hand_off:
            hand_off.over = True
            if hand_off.sender.alive:
                hand_off.sender.drop(hand_off.sending)
        assert asked.placement is not None, "only what is placed can lose its worker"
        del self._on[asked.placement.decode][asked.id]
        asked.attempt += 1
        self._submit(asked)

    def _beat(self) -> None:
        if self._open:
            for worker in self._workers.values():
                worker.beat()
            self._clock.after(HEARTBEAT_SECONDS, self._beat)

    def _rescale(self) -> None:
        """As the policy's autoscaler wants it, if it has one."""
        seconds = self._constants.autoscale.interval_seconds
        for wanted in self._policy.rescale(self._clock.now) if self._open else ():
            worker = self._workers[wanted.worker]
            self._role_changes.append(RoleChange(self._clock.now, worker.id, wanted.role))
            worker.set_role(wanted.role)
            self._policy.set_role(worker.id, worker.info.epoch, wanted.role)
        if self._open and self._constants.autoscale.enabled:
            self._advance()
            self._clock.after(seconds, self._rescale)

    def _look(self) -> None:
        workers = self._workers.values()
        running = tuple(worker.running for worker in workers)
        self._looks.append(Look(self._clock.now, running, tuple(worker.prompt_tokens_waiting for worker in workers)))
        if self._open:
            self._clock.after(self._look_seconds, self._look)
