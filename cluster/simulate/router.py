"""What any router knows: workers, their last reports, the exact index, its own books. Leaves the choice to others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from cluster.scheduler.prefix_index import PrefixIndex
from diptych.errors import NoWorker, PromptTooLong, ServingError
from diptych.types import Cleared, Load, Placement, RequestId, WorkerId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cluster.scheduler.costs import RequestShape
    from diptych.types import Outcome, Report, Role, SetWorkerRole, WorkerInfo


@dataclass(slots=True, eq=False)
class Known:
    """One worker."""

    info: WorkerInfo
    load: Load = field(default_factory=Load)
    placed_tokens: int = 0
    """Placed here since the last report, as are these:"""
    placed_requests: int = 0
    booked_tokens: int = 0
    """By the router's own books: of prompts sent here whose first token has not come."""
    booked_blocks: int = 0
    """By the router's own books: of requests that decode here."""

    @property
    def id(self) -> WorkerId:
        return self.info.id

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to compute before a newcomer's."""
        return self.load.waiting_tokens + self.placed_tokens

    @property
    def requests(self) -> int:
        return self.load.running_requests + self.load.waiting_requests + self.placed_requests

    @property
    def waiting_requests(self) -> int:
        return self.load.waiting_requests + self.placed_requests


class _Entry(NamedTuple):
    """A request in the books."""

    computes: Known
    tokens: int
    decodes: Known
    blocks: int


class Router:
    """A policy without a queue: every request is placed at once."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._index = PrefixIndex()
        self._workers: dict[WorkerId, Known] = {}
        self._books: dict[RequestId, _Entry] = {}
        self.turn = 0
        """Requests placed before this one."""

    @classmethod
    def variants(cls) -> Iterator[Callable[[], Router]]:
        """Makers of one for each set of weights worth a try."""
        return iter((cls,))

    @property
    def weights(self) -> str:
        """In words; empty where there are none."""
        return ""

    # ---- the choice -----------------------------------------------------------------------------

    def prefill(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        """Who computes the prompt; `hits` are leading prompt tokens that each worker has."""
        raise NotImplementedError

    def decode(self, shape: RequestShape, hits: Mapping[WorkerId, int], pool: Sequence[Known]) -> Known:
        """Who decodes."""
        raise NotImplementedError

    def is_local(self, shape: RequestShape, hits: Mapping[WorkerId, int], decode: Known) -> bool:
        """Whether who decodes computes the prompt too."""
        del shape, hits, decode
        return False

    # ---- as every policy --------------------------------------------------------------------------

    def join(self, info: WorkerInfo, now: float) -> None:
        del now
        self._index.add(info.id, info.layout.block_size)
        self._workers[info.id] = Known(info, Load(blocks_free=info.blocks))

    def rescale(self, now: float) -> Sequence[SetWorkerRole]:
        """They don't."""
        del now
        return ()

    def set_role(self, worker: WorkerId, epoch: int, role: Role) -> None:
        """Nobody asks for it."""

    def leave(self, worker: WorkerId, epoch: int, now: float) -> None:
        del now
        if worker in self._workers and self._workers[worker].info.epoch == epoch:
            del self._workers[worker]
            self._index.drop(worker)

    def report(self, report: Report, now: float) -> bool:
        del now
        known = self._workers.get(report.worker)
        if known is None or known.info.epoch != report.epoch:
            return False
        known.load = report.load
        known.placed_tokens = known.placed_requests = 0
        if report.full:
            self._index.apply(report.worker, Cleared())
        for event in report.events:
            self._index.apply(report.worker, event)
        return False

    def submit(self, shape: RequestShape, now: float) -> Placement | None:
        """Raises NoWorker or PromptTooLong."""
        del now
        hits = self._index.longest_prefix(shape.granules)
        prefill, decode, mixed = (self._pool(role, shape) for role in ("prefill", "decode", "mixed"))
        if prefill and decode:
            decodes = self.decode(shape, hits, decode)
            computes = decodes if self.is_local(shape, hits, decodes) else self.prefill(shape, hits, prefill)
        elif mixed:
            decodes = computes = self.prefill(shape, hits, mixed)
        else:
            raise NoWorker(f"{len(prefill)} prefill and {len(decode)} decode workers can take {shape.request}")
        self._book(shape, computes, decodes, hits)
        self.turn += 1
        how = "remote" if computes is not decodes else ("local" if decodes.info.role == "decode" else "mixed")
        sender = computes.id if how == "remote" else None
        return Placement(decode=decodes.id, prefill=sender, how=how, reason=self.name)

    def advance(self, now: float) -> Sequence[tuple[RequestId, Placement | ServingError]]:
        del now
        return ()

    def next_turn(self, now: float) -> float | None:
        del now
        return None

    def spoke(self, request: RequestId, now: float) -> None:
        del now
        entry = self._books.get(request)
        if entry:
            entry.computes.booked_tokens -= entry.tokens
            self._books[request] = entry._replace(tokens=0)

    def finished(self, outcome: Outcome, now: float) -> None:
        del now
        self._unbook(outcome.request)

    # ---- inside -------------------------------------------------------------------------------------

    def _pool(self, role: Role, shape: RequestShape) -> list[Known]:
        workers = [worker for worker in self._workers.values() if worker.info.role == role]
        wanted = shape.prompt_tokens if role == "prefill" else shape.context
        large = [worker for worker in workers if worker.info.max_context >= wanted]
        if workers and not large:
            raise PromptTooLong(f"{shape.request} of {wanted:,} tokens is too long for every {role} worker")
        return large

    def _book(self, shape: RequestShape, computes: Known, decodes: Known, hits: Mapping[WorkerId, int]) -> None:
        self._unbook(shape.request)
        tokens = max(0, shape.prompt_tokens - hits.get(computes.id, 0))
        blocks = -(-shape.prompt_tokens // decodes.info.layout.block_size)
        computes.placed_tokens += tokens
        decodes.placed_requests += 1
        if computes is not decodes:
            computes.placed_requests += 1
        computes.booked_tokens += tokens
        decodes.booked_blocks += blocks
        self._books[shape.request] = _Entry(computes, tokens, decodes, blocks)

    def _unbook(self, request: RequestId) -> None:
        entry = self._books.pop(request, None)
        if entry:
            entry.computes.booked_tokens -= entry.tokens
            entry.decodes.booked_blocks -= entry.blocks
