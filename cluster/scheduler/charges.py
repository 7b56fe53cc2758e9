"""What each tenant pays for its requests: prompts when they are placed, answers when they are over. Knows no order.

In seconds of computing prompts. An answer's token costs what two of a prompt do, as in VTC (Sheng et al.,
OSDI 2024); as many as the tenant's answers had so far are paid in advance.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.scheduler.admission import rank_of

if TYPE_CHECKING:
    from cluster.scheduler.admission import Admission
    from cluster.scheduler.costs import RequestShape
    from diptych.types import Outcome, RequestId

_ANSWER_TOKEN: Final = 2.0
_NEWEST: Final = 0.1
"""Weight of the newest answer in what is expected."""
_REMEMBERED: Final = 65_536
"""Of placed requests whose end nobody told, the oldest are forgotten."""


class _Paid(NamedTuple):
    rank: int
    tenant: str
    tokens: float
    """Of the answer, in advance."""
    token_seconds: float


class Charges:
    """Of one scheduler."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._expected: OrderedDict[str, float] = OrderedDict()
        """Tokens of an answer, by tenant."""
        self._paid: OrderedDict[RequestId, _Paid] = OrderedDict()

    def placed(self, shape: RequestShape, seconds: float, token_seconds: float) -> None:
        """`seconds` of computing its prompt."""
        rank, tokens = rank_of(shape.priority), min(shape.max_tokens, self._expected.get(shape.tenant, 0.0))
        paid = self._paid[shape.request] = _Paid(rank, shape.tenant, tokens, token_seconds)
        self._admission.charge(rank, shape.tenant, seconds + _price(paid, tokens), chosen=True)
        if len(self._paid) > _REMEMBERED:
            self._paid.popitem(last=False)

    def settle(self, outcome: Outcome) -> None:
        """The answer had so many tokens."""
        paid = self._paid.pop(outcome.request, None)
        if paid is None:
            return
        self._admission.charge(paid.rank, paid.tenant, _price(paid, outcome.tokens - paid.tokens), chosen=False)
        before = self._expected.get(paid.tenant, float(outcome.tokens))
        self._expected[paid.tenant] = before + _NEWEST * (outcome.tokens - before)
        self._expected.move_to_end(paid.tenant)
        if len(self._expected) > _REMEMBERED:
            self._expected.popitem(last=False)


def _price(paid: _Paid, tokens: float) -> float:
    return _ANSWER_TOKEN * tokens * paid.token_seconds
