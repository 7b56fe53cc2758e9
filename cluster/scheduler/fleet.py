"""The workers as columns of numbers: what placing a request needs of them, ready for numpy. Knows no names.

A worker's column is its slot in the prefix index. Columns without a worker, and those of workers that
are not placed on, are barred from every pool by an infinite cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.scheduler.backlog import RANKS
from cluster.scheduler.rates import EXPOSED_PRIOR, STEP_PRIOR, TRANSFER_PRIOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diptych.types import Role

Array: TypeAlias = NDArray[np.float64]
Slots: TypeAlias = NDArray[np.intp]

NEAR, FAR = 0, 1
"""Kinds of a pair of workers: on one host, or not. Rows of the link columns."""
_ROOM = 8
_FEW = 8
"""Bits of a set that are looked at one by one."""
_TIE_REQUEST, _TIE_TURN = 1e-7, 1e-13
"""Seconds that a request, and having been chosen a turn later, count for: less than any real difference."""


def _column(value: float = 0.0, rows: int = 1) -> Array:
    return np.full((rows, _ROOM) if rows > 1 else _ROOM, value)


class Fleet:
    """Written by the view alone."""

    def __init__(self) -> None:
        self._by_host: tuple[Slots, Slots] | None = None
        self._addresses: bytes | None = None
        self._mean_token_seconds: float | None = None
        self._fetching: dict[float, tuple[Array, Array]] = {}
        """By the holder's host."""
        self.placeable: dict[Role, int] = {"prefill": 0, "decode": 0, "mixed": 0}
        """Workers of each pool."""
        self.block_size: int | None = None
        """Of all workers; None when they differ."""
        self.least_step_tokens = np.inf
        """Of all workers, what was seen in one step."""
        self.shortest_context = np.inf
        """What every worker holds, of prompt and answer."""
        # ---- learned -------------------------------------------------------------------------------
        self.step_seconds = _column(STEP_PRIOR[0])
        """Of an empty step."""
        self.token_seconds = _column(STEP_PRIOR[1])
        self.pair_seconds = _column(STEP_PRIOR[2])
        self.row_seconds = _column(STEP_PRIOR[3])
        self.context_seconds = _column(STEP_PRIOR[4])
        self.kind_step_seconds = _column(STEP_PRIOR[0])
        """As above, in the mean of its kind where its own differ from that."""
        self.kind_token_seconds = _column(STEP_PRIOR[1])
        self.kind_pair_seconds = _column(STEP_PRIOR[2])
        self.step_tokens = _column(np.inf)
        """Most prompt tokens seen in one step."""
        self.fetch_seconds = _column(TRANSFER_PRIOR[0], 2)
        """Of a transfer to here, whatever its size, by kind of pair."""
        self.fetch_token_seconds = _column(rows=2)
        self.exposed_seconds = _column(EXPOSED_PRIOR[0], 2)
        """As above, of what a hand-off doesn't hide behind computing."""
        self.exposed_token_seconds = _column(rows=2)
        """Of the KV of one token."""

        # ---- reported and placed since ---------------------------------------------------------------
        self.idle_at = _column(rows=RANKS)
        """When the prompts that wait there are computed, in monotonic seconds, for a newcomer of each rank."""
        self.requests = _column()
        """Running, waiting and on their way here."""
        self.rows = _column()
        """Those of them that decode here or will: none in the prefill pool."""
        self.context_tokens = _column()
        """KV that the rows read in each step."""
        self.beside_seconds = _column()
        """A step as it is now, without a newcomer."""
        self.room_tokens = _column(np.inf)
        """What a newcomer could have now, in whole blocks; negative when more is on its way than fits."""
        self.tie = _column()
        """Next to nothing: orders equals by requests, then by who was chosen longest ago."""

        # ---- told at the door ------------------------------------------------------------------------
        self.block_tokens = _column(16.0)
        self.token_bytes = _column()
        self.most_tokens = _column()
        """The longest prompt with its answer."""
        self.host = _column(-1.0)
        self.prefill = _column(np.inf)
        """0 for those of the pool that are placed on."""
        self.decode = _column(np.inf)
        self.mixed = _column(np.inf)
        self.alive = _column()
        """1 where a worker would answer."""

    def __len__(self) -> int:
        return len(self.rows)

    def spread(self, depths: Sequence[tuple[int, int]]) -> Array:
        """(tokens, who has exactly so many) as a column."""
        slots = len(self)
        tokens = np.zeros(slots)
        for depth, holders in depths:
            if holders.bit_count() <= _FEW:
                while holders:
                    tokens[holders.bit_length() - 1] = depth
                    holders &= ~(1 << holders.bit_length() - 1)
            else:
                raw = np.frombuffer(holders.to_bytes(-(-slots // 8), "little"), np.uint8)
                tokens[np.flatnonzero(np.unpackbits(raw, count=slots, bitorder="little"))] = depth
        return tokens

    @property
    def by_host(self) -> tuple[Slots, Slots]:
        """All slots, host after host, and where in that order each host begins."""
        if self._by_host is None:
            order = np.argsort(self.host, kind="stable")
            order = order[self.host[order] >= 0]
            self._by_host = order, np.flatnonzero(np.diff(self.host[order], prepend=-1.0))
        return self._by_host

    def addresses(self, columns: Sequence[str]) -> bytes:
        """Where in memory those columns begin, and the two of `by_host`; always asked for the same."""
        if self._addresses is None:
            found: list[Array | Slots] = [getattr(self, name) for name in columns]
            assert all(column.flags.c_contiguous for column in found), "a column has gaps"
            self._addresses = np.array([column.ctypes.data for column in (*found, *self.by_host)]).tobytes()
        return self._addresses

    def mean_token_seconds(self) -> float:
        """To compute one prompt token, of those who compute prompts."""
        if self._mean_token_seconds is None:
            self._mean_token_seconds = self._sum_up_rates()
        return self._mean_token_seconds

    def _sum_up_rates(self) -> float:
        computes = (self.prefill == 0.0) | (self.mixed == 0.0)
        if not computes.any():
            computes = self.decode == 0.0
        return float(self.token_seconds[computes].mean()) if computes.any() else float(self.token_seconds[0])

    def settle(self, slot: int, host: float) -> None:
        """A worker's host, by number."""
        self.host = self.host.copy()  # Decisions that are still told of have the old one.
        self.host[slot] = host
        self._by_host = self._addresses = None
        self.links_changed()

    def pool(self, role: Role) -> Array:
        """0 for those that may be placed on, infinity for all others."""
        return {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}[role]

    def open(self, slot: int, role: Role, *, placeable: bool, alive: bool) -> None:
        """Whether the worker may be placed on, and whether it would answer."""
        pool = self.pool(role)
        pool[slot], self.alive[slot] = 0.0 if placeable else np.inf, float(alive)
        self.placeable[role] = int(np.count_nonzero(pool == 0.0))
        self._sum_up()

    def sum_step(self, slot: int) -> None:
        """After a change of the worker's rows or their context."""
        rows = self.row_seconds.item(slot) * self.rows.item(slot)
        context = self.context_seconds.item(slot) * self.context_tokens.item(slot)
        self.beside_seconds[slot] = self.step_seconds.item(slot) + rows + context

    def saw_step(self, slot: int, prompt_tokens: float) -> None:
        """A step had so many prompt tokens."""
        known = self.step_tokens.item(slot)
        if prompt_tokens and (known == np.inf or prompt_tokens > known):
            self.step_tokens[slot] = prompt_tokens
            self.least_step_tokens = float(self.step_tokens.min())

    def fetching(self, holder: int) -> tuple[Array, Array]:
        """Seconds that each worker needs to get anything from the holder's cache, and per token."""
        if len(self.by_host[1]) == 1:
            return self.fetch_seconds[NEAR], self.fetch_token_seconds[NEAR]
        host = float(self.host[holder])
        if host not in self._fetching:
            near: NDArray[np.bool_] = self.host == host
            self._fetching[host] = (
                np.where(near, self.fetch_seconds[NEAR], self.fetch_seconds[FAR]),
                np.where(near, self.fetch_token_seconds[NEAR], self.fetch_token_seconds[FAR]),
            )
        return self._fetching[host]

    def rates_changed(self, slot: int) -> None:
        """After a change of what steps take there."""
        self._mean_token_seconds = None
        self.sum_step(slot)

    def links_changed(self) -> None:
        """After a change of what transfers take, or of who is where."""
        self._fetching.clear()

    def queue(self, slot: int, rank: int, at: float, seconds: float) -> None:
        """A prompt more to compute there: work for who comes after it, of its rank or a lower one."""
        idle_at = self.idle_at
        for lower in range(rank, RANKS):
            idle_at[lower, slot] = max(idle_at.item(lower, slot), at) + seconds

    def join_rows(self, slot: int, blocks: int, context_tokens: float) -> None:
        """A request more that will decode there; `blocks` are those of its prompt that are not there yet."""
        self.requests[slot] = self.requests.item(slot) + 1.0
        self.rows[slot] = self.rows.item(slot) + 1.0
        self.context_tokens[slot] = self.context_tokens.item(slot) + context_tokens
        self.room_tokens[slot] = self.room_tokens.item(slot) - blocks * self.block_tokens.item(slot)
        self.sum_step(slot)

    def rank(self, slot: int, turn: int) -> None:
        """Its place among equals, after a change of its requests or after it was chosen."""
        self.tie[slot] = self.requests.item(slot) * _TIE_REQUEST + turn * _TIE_TURN

    def vacate(self, slot: int) -> None:
        """Nobody is there: as it was at first, and there is such a column."""
        blank = Fleet()
        columns = [name for name, column in vars(self).items() if isinstance(column, np.ndarray)]
        while slot >= len(self):
            for name in columns:
                setattr(self, name, np.concatenate((getattr(self, name), getattr(blank, name)), axis=-1))
        for name in columns:
            getattr(self, name)[..., slot] = getattr(blank, name)[..., 0]
        self._by_host = self._addresses = None
        self.links_changed()
        for role in self.placeable:
            self.placeable[role] = int(np.count_nonzero(self.pool(role) == 0.0))
        self._sum_up()

    def _sum_up(self) -> None:
        self._mean_token_seconds = None
        alive = self.alive > 0.0
        sizes = set(self.block_tokens[alive].tolist())
        self.block_size = int(sizes.pop()) if len(sizes) == 1 else None
        self.shortest_context = float(self.most_tokens[alive].min(initial=np.inf))
