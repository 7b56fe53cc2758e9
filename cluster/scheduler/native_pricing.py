"""`pricing` in C++ (`native/pricing.cpp`): one call a request. Knows where columns lie, not what they mean."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from math import inf
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from cluster.cache import cache_folder
from cluster.scheduler import rule
from cluster.scheduler.costs import Asked, Estimate
from cluster.scheduler.pricing import Priced, price_by_numpy
from cluster.scheduler.ways import Sides, Way
from diptych.compiling import NoLibrary, compiled_library
from diptych.types import How

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.scheduler.fleet import Array, Fleet
    from cluster.scheduler.pricing import Pricing

# ---- the layouts that the C++ side reads and writes ------------------------------------------------

_log = logging.getLogger(__name__)
_SOURCES: Final = Path(__file__).with_name("native")
_COLUMNS: Final = (
    *("beside_seconds", "token_seconds", "pair_seconds", "step_tokens"),
    *("fetch_seconds", "fetch_token_seconds", "exposed_seconds", "exposed_token_seconds"),
    *("idle_at", "rows", "row_seconds", "context_seconds", "context_tokens", "room_tokens", "tie"),
    *("block_tokens", "most_tokens", "host", "prefill", "decode", "mixed", "alive"),
    *("step_seconds", "kind_step_seconds", "kind_token_seconds", "kind_pair_seconds"),
)
_WEIGHTS: Final = Struct("=6d").pack(
    rule.WITHIN, rule.BEYOND, rule.USUAL_WITHIN, rule.USUAL_JUMP, rule.USUAL_BEYOND, rule.NO_WAIT
)
_ASKED: Final = Struct("=11q12d")
_TOKENS: Final = Struct("=d")
_RULES: Final = {"auto": 0, "remote": 1, "local": 2}
_HOWS: Final[tuple[How, How, How]] = ("local", "mixed", "remote")
_ROWS: Final = 20
_NOBODY: Final = float("nan")
"""Stands for None where seconds were promised by nobody."""


class NativeCosts(NamedTuple):
    """All that C++ found, turned into columns when somebody asks."""

    slots: int
    found: ctypes.Array[ctypes.c_double]
    """[rows, slots]"""
    answer: Sequence[float]
    asked: Asked

    @property
    def estimate(self) -> Estimate:
        rows = self._rows()
        holder, second, fetches, waits = self.answer[4:8]
        return Estimate(
            wait=rows[0],
            reused_tokens=rows[1],
            fetched_tokens=rows[2] if fetches else None,
            fetch=rows[3] if fetches else None,
            holder=int(holder),
            second_holder=int(second),
            prompt=rows[4],
            compute=rows[5],
            work=rows[19],
            first_token=rows[6],
            transfer=rows[7:9],
            room=rows[9] if waits else None,
            step=rows[10],
            growth=rows[11],
            rows=rows[12],
            missing_tokens=rows[13],
            answer_tokens=self.asked.answer_tokens,
        )

    @property
    def sides(self) -> Sides:
        rows = self._rows()
        return Sides(prefill=rows[14], decode=rows[15:17], local=rows[17], mixed=rows[18], late=self.asked.late)

    def _rows(self) -> Array:
        return np.frombuffer(memoryview(self.found)).reshape(_ROWS, self.slots)


@cache
def fastest_pricing() -> Pricing:
    """In C++ where that compiles (2 s, once a machine), else in numpy: the same choices for the same costs."""
    try:
        try:
            return native_pricing(cache_folder() / "scheduler")
        except NoLibrary:
            return native_pricing(None)  # the folder may be read-only
    except Exception as error:
        _log.warning("placements are priced by numpy, which takes three times the CPU: %s", error)
        return price_by_numpy


def native_pricing(folder: Path | None) -> Pricing:
    """From `folder` or compiled into it. Raises NoLibrary."""
    call = compiled_library(_SOURCES, folder).price
    call.argtypes = [*(ctypes.c_char_p,) * 3, *(ctypes.c_void_p,) * 2]
    call.restype = None
    answer = (ctypes.c_double * 18)()

    def price(fleet: Fleet, asked: Asked) -> Priced | None:
        slots = len(fleet)
        found = _block(slots)()
        call(_WEIGHTS, fleet.addresses(_COLUMNS), _packed(fleet, asked, slots), found, answer)
        told = answer[:]
        cost, how, prefill, decode = told[:4]
        if not cost < inf:
            return None
        way = Way(cost, _HOWS[int(how)], int(prefill), int(decode))
        lender, wait, first, compute, reused, fetched, uncached, lacked, step, gap = told[8:]
        costs = NativeCosts(slots, found, told, asked)
        return Priced(way, int(lender), wait, first, compute, reused, fetched, uncached, lacked, step, gap, costs)

    return price


@cache
def _block(slots: int) -> type[ctypes.Array[ctypes.c_double]]:
    return ctypes.c_double * (_ROWS * slots)


def _packed(fleet: Fleet, asked: Asked, slots: int) -> bytes:
    order, starts = fleet.by_host
    placeable, late = fleet.placeable, asked.late
    ttft, itl, usual = asked.ttft_seconds, asked.itl_seconds, asked.usual_seconds
    packed = _ASKED.pack(
        slots,
        len(starts),
        len(order),
        asked.rank,
        _RULES[asked.how],
        placeable["prefill"],
        placeable["decode"],
        placeable["mixed"],
        fleet.block_size or 0,
        len(asked.held),
        len(asked.promised),
        asked.prompt_tokens,
        asked.context,
        asked.answer_tokens,
        asked.now,
        fleet.least_step_tokens,
        fleet.shortest_context,
        _NOBODY if ttft is None else ttft,
        _NOBODY if itl is None else itl,
        _NOBODY if usual is None else usual,
        late["local"],
        late["mixed"],
        late["remote"],
    )
    return packed + _depths(asked.held, slots) + _depths(asked.promised, slots)


def _depths(depths: Sequence[tuple[int, int]], slots: int) -> bytes:
    """Of each the tokens, and the slots as a bit set of whole words."""
    width = -(-slots // 64) * 8
    return b"".join([_TOKENS.pack(tokens) + holders.to_bytes(width, "little") for tokens, holders in depths])
