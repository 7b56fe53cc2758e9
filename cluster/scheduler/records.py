"""What was decided for the latest requests, and how it went: a bounded ring. Decides nothing, has no clock.

A record costs a decision one small object. Words and tables are made when somebody asks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.scheduler.accuracy import compared
from cluster.scheduler.explain import candidates, reason
from diptych.errors import UnknownRequest
from diptych.types import Accuracy, Explanation, PlacedAt

if TYPE_CHECKING:
    from cluster.scheduler.costs import RequestShape
    from cluster.scheduler.placement import Considered
    from diptych.types import Outcome, Placement, RequestId

RECORDS: Final = 4096
"""Kept: the latest ones."""
_SUFFIXES: Final = re.compile(r"(-\d+)?~[0-9a-f]+")
"""What a front adds to its caller's id: the number of the choice, if there are several, and its own mark."""


class _Placed(NamedTuple):
    at: float
    placement: Placement
    considered: Considered | None
    """What its words are made from."""


@dataclass(slots=True, eq=False)
class _Record:
    """Of one request; its names of blocks are left out, which a long prompt has megabytes of."""

    tenant: str
    priority: int
    prompt_tokens: int
    max_tokens: int
    wishes: tuple[float | None, float | None, float | None]
    """`ttft_seconds`, `itl_seconds` and `deadline_seconds` of its shape."""
    asked: float
    placements: list[_Placed] = field(default_factory=list["_Placed"])
    refusal: str = ""
    outcome: Outcome | None = None
    ended: float | None = None


class Records:
    """Of one scheduler. `now` is monotonic seconds everywhere."""

    def __init__(self, size: int = RECORDS) -> None:
        assert size > 0, f"a ring of {size} records keeps none"
        self._size = size
        self._records: dict[RequestId, _Record] = {}
        self._accuracy = Accuracy()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def accuracy(self) -> Accuracy:
        """Of all outcomes so far, those whose records are gone included."""
        return self._accuracy

    def asked(self, shape: RequestShape, now: float) -> None:
        """A request came. Asked for again, after its worker was lost, it is still the same one."""
        if shape.request not in self._records:
            self._records[shape.request] = _record(shape, now)
            if len(self._records) > self._size:
                del self._records[next(iter(self._records))]

    def placed(
        self, shape: RequestShape, placement: Placement, now: float, considered: Considered | None = None
    ) -> None:
        """It goes there; `considered` can tell why."""
        self.asked(shape, now)
        self._records[shape.request].placements.append(_Placed(now, placement, considered))

    def refused(self, request: RequestId, error: Exception, now: float) -> None:
        """It goes nowhere."""
        if record := self._records.get(request):
            record.refusal, record.ended = f"{type(error).__name__}: {error}", now

    def finished(self, outcome: Outcome, now: float) -> None:
        """Its front's last word."""
        record = self._records.get(outcome.request)
        if record is None or record.outcome is not None:
            return
        record.outcome, record.ended = outcome, now
        if record.placements:
            self._accuracy = compared(self._accuracy, record.placements[-1].placement, outcome)

    def explain(self, request: str, now: float) -> tuple[Explanation, ...]:
        """By our id or by the caller's, which several choices share. Raises UnknownRequest."""
        found = [id_ for id_ in self._records if id_ == request or _is_callers(request, id_)]
        if not found:
            raise UnknownRequest(
                f"no record of {request!r}: the last {self._size:,} requests are kept, {len(self._records):,} are here "
                f"now. An id is what the answer's x-request-id says"
            )
        return tuple(_explanation(id_, self._records[id_], now) for id_ in found)


def _record(shape: RequestShape, now: float) -> _Record:
    wishes = (shape.ttft_seconds, shape.itl_seconds, shape.deadline_seconds)
    return _Record(shape.tenant, shape.priority, shape.prompt_tokens, shape.max_tokens, wishes, now)


def _is_callers(request: str, ours: str) -> bool:
    return ours.startswith(request) and _SUFFIXES.fullmatch(ours, len(request)) is not None


def _explanation(request: RequestId, record: _Record, now: float) -> Explanation:
    ttft, itl, deadline = record.wishes
    return Explanation(
        request=request,
        tenant=record.tenant,
        priority=record.priority,
        prompt_tokens=record.prompt_tokens,
        max_tokens=record.max_tokens,
        ttft_seconds=ttft,
        itl_seconds=itl,
        deadline_seconds=deadline,
        age_seconds=now - record.asked,
        placements=tuple(_told(placed, record.asked) for placed in record.placements),
        refusal=record.refusal,
        outcome=record.outcome,
        ended_seconds=None if record.ended is None else _ended_seconds(record),
    )


def _told(placed: _Placed, asked: float) -> PlacedAt:
    placement = placed.placement
    if placed.considered is not None:
        placement = replace(placement, reason=reason(placed.considered), candidates=candidates(placed.considered))
    return PlacedAt(placement=placement, seconds=placed.at - asked)


def _ended_seconds(record: _Record) -> float:
    """As its front saw it: its word came a little later."""
    assert record.ended is not None, "only what has ended is asked"
    outcome = record.outcome
    if outcome is None or outcome.ttft_seconds is None or not record.placements:
        return record.ended - record.asked
    placed = record.placements[-1].at - record.asked
    return placed + outcome.ttft_seconds + (outcome.itl_seconds or 0.0) * (outcome.tokens - 1)
