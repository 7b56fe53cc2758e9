"""What serving a request on each worker would take, in seconds: columns beside the fleet's. Chooses nothing.

Everything is computed for all workers at once, whatever their role: as who computes the prompt, and as
who decodes it. No part needs the pair but the transfer, and that only whether the two share a host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from cluster.scheduler.fleet import Array
from diptych.types import BlockHash, How, RequestId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cluster.scheduler.fleet import Fleet

Rule: TypeAlias = Literal["auto", "remote", "local"]
"""`placement.how`. auto: the cheapest way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """All that placement needs to know of a request."""

    request: RequestId
    granules: tuple[BlockHash, ...]
    """Names of the prompt's full 16-token granules, chained from the root of the cluster's model."""
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    """Lower goes first."""
    tenant: str = ""
    ttft_seconds: float | None = None
    """The wish of its sender: the first token within so long of the arrival. None: the cluster's default."""
    itl_seconds: float | None = None
    """As `ttft_seconds`, of the mean time between tokens."""
    deadline_seconds: float | None = None
    """From the arrival: later than that nobody wants the answer."""

    @property
    def rank(self) -> int:
        """Of its priority: high, normal or low."""
        return 0 if self.priority < 0 else 1 if self.priority == 0 else 2

    @property
    def context(self) -> int:
        """The longest it can become, in tokens."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What placement is free to do and what it is held to."""

    how: Rule = "auto"
    ttft_seconds: float | None = None
    """For requests that have no wish of their own; None when nobody promised anything."""
    itl_seconds: float | None = None


class Asked(NamedTuple):
    """What of a request, and of the cluster at that moment, its price depends on beside the fleet's columns."""

    prompt_tokens: int
    context: int
    """The longest it can become, in tokens."""
    answer_tokens: float
    """How long its answer becomes, on average."""
    held: Sequence[tuple[int, int]]
    """(leading prompt tokens in whole blocks, a bit for the slot of each who has so many)."""
    promised: Sequence[tuple[int, int]]
    """As `held`, of those who will have them; later ones count where two name one slot."""
    rank: int
    now: float
    """Monotonic seconds."""
    ttft_seconds: float | None
    """What it was promised; None when nobody promised anything."""
    itl_seconds: float | None
    usual_seconds: float | None
    """What is usual to wait for the first token; None when that isn't known."""
    late: Mapping[How, float]
    """What each way's first tokens come later than the rest predicts."""
    how: Rule


@dataclass(slots=True, eq=False)
class Estimate:
    """One request on each worker, by slot. Seconds unless named otherwise."""

    # ---- to compute the prompt there ---------------------------------------------------------------
    wait: Array
    """Until what waits there is computed."""
    reused_tokens: Array
    """Cached there, or promised to be by then; in whole blocks."""
    fetched_tokens: Array | None
    """From the cache of `holder`; None where that pays for nobody."""
    fetch: Array | None
    holder: int
    """Slot of who has most of the prompt; -1 when nobody has any."""
    second_holder: int
    """Who has most for the holder itself."""
    prompt: Array
    """What the prompt adds to the steps that compute it."""
    compute: Array
    """Those steps as a whole, with what else they decode."""
    work: Array
    """As `compute`, at the pace that is its kind's: equal workers never measure the same, and the one that seems the
    fastest would get all that is usual to wait for while the others idle."""
    first_token: Array
    """From now: wait, fetch and compute."""

    # ---- to decode there ---------------------------------------------------------------------------
    transfer: Array
    """What of a hand-off isn't hidden behind computing. Two rows: from a worker of the same host, or not."""
    room: Array | None
    """Until blocks are free for it; None when all have room."""
    step: Array
    """One step with the newcomer in it."""
    growth: Array
    """What of it is due to the newcomer."""
    rows: Array
    """Requests that decode there already."""
    missing_tokens: Array
    """Of the prompt, to be sent there."""
    answer_tokens: float

    def holder_for(self, slot: int) -> int:
        """Who lends that worker a prefix; asked only if it fetches."""
        return self.second_holder if slot == self.holder else self.holder


def estimate(fleet: Fleet, asked: Asked) -> Estimate:
    """`native/pricing.cpp` says the same once more, operation for operation."""
    prompt_tokens, answer_tokens = asked.prompt_tokens, asked.answer_tokens
    held = reused = fleet.spread(asked.held)
    if asked.promised:
        promised = fleet.spread(asked.promised)
        reused = np.maximum(held, promised if fleet.block_size else promised - promised % fleet.block_tokens)
    if reused[reused.argmax()] >= prompt_tokens:
        # The block of the last token is always computed: its logits are needed.
        reused = reused - fleet.block_tokens * (reused >= prompt_tokens)
    missing = prompt_tokens - reused
    holder, second, fetched, fetch = _fetch(fleet, prompt_tokens, held * fleet.alive, reused)
    computed = missing if fetched is None else missing - fetched
    prompt = computed * (fleet.token_seconds + fleet.pair_seconds * (prompt_tokens - computed * 0.5))
    steps = 1.0
    if prompt_tokens > fleet.least_step_tokens:
        steps = 1.0 + np.floor((computed - 1.0) / fleet.step_tokens)
    compute = steps * fleet.beside_seconds + prompt
    work = steps * (fleet.beside_seconds - fleet.step_seconds + fleet.kind_step_seconds) + computed * (
        fleet.kind_token_seconds + fleet.kind_pair_seconds * (prompt_tokens - computed * 0.5)
    )
    wait = np.maximum(fleet.idle_at[asked.rank] - asked.now, 0.0)
    first_token = wait + compute
    if fetch is not None:
        first_token += fetch
    growth = fleet.row_seconds + fleet.context_seconds * (prompt_tokens + 0.5 * answer_tokens)
    step = fleet.beside_seconds + growth
    return Estimate(
        wait=wait,
        reused_tokens=reused,
        fetched_tokens=fetched,
        fetch=fetch,
        holder=holder,
        second_holder=second,
        prompt=prompt,
        compute=compute,
        work=work,
        first_token=first_token,
        transfer=fleet.exposed_seconds + fleet.exposed_token_seconds * missing,
        room=_room(fleet, missing, answer_tokens, step),
        step=step,
        growth=growth,
        rows=fleet.rows.copy(),
        missing_tokens=missing,
        answer_tokens=answer_tokens,
    )


def _fetch(fleet: Fleet, prompt_tokens: int, held: Array, reused: Array) -> tuple[int, int, Array | None, Array | None]:
    """Who has most of the prompt, who has next to most, and for whom it is cheaper to get it than to compute it."""
    holder = int(held.argmax())
    top = held.item(holder)
    if not top:
        return -1, -1, None, None
    held[holder] = 0.0
    second = int(held.argmax())
    fetched = _reach(fleet, top, prompt_tokens) - reused
    fetched[holder] = _whole(fleet, holder, min(float(held[second]), prompt_tokens - 1.0)) - reused[holder]
    fetched = np.maximum(fetched, 0.0)
    if not fetched[fetched.argmax()]:
        return holder, second, None, None
    fixed_seconds, token_seconds = fleet.fetching(holder)
    price = fixed_seconds + token_seconds * fetched
    # The pairs of the tokens fetched: each one looks at all before it.
    saved = fetched * (fleet.token_seconds + fleet.pair_seconds * (reused + 0.5 * fetched))
    pays: NDArray[np.bool_] = price < saved
    if not pays[pays.argmax()]:
        return holder, second, None, None
    return holder, second, fetched * pays, price * pays


def _reach(fleet: Fleet, held: float, prompt_tokens: int) -> Array | float:
    """So much of a holder's prefix can each worker use, in whole blocks of its own."""
    held = min(held, prompt_tokens - 1.0)
    return held - held % (fleet.block_size or fleet.block_tokens)


def _whole(fleet: Fleet, slot: int, tokens: float) -> float:
    return tokens - tokens % float(fleet.block_tokens[slot])


def _room(fleet: Fleet, missing: Array, answer_tokens: float, step: Array) -> Array | None:
    """What doesn't fit waits for as many tokens to leave: all that are there do in the time of an answer."""
    if fleet.room_tokens.item(int(fleet.room_tokens.argmin())) >= missing.item(int(missing.argmax())) + answer_tokens:
        return None
    lacking = missing + answer_tokens - fleet.room_tokens
    there = np.maximum(fleet.context_tokens, fleet.block_tokens)
    return np.maximum(lacking, 0.0) / there * answer_tokens * step
