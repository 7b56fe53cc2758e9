"""The rule of placement: what of a request's estimate counts, and for how much. One number per worker and side.

    cost = when the answer is complete, and how much later everybody else's are because of it

`native/pricing.cpp` says the same once more, with these weights.

Seconds of the request and of the others count alike. Where somebody promised a first token or a pace,
what keeps to the promise costs only the work it takes (so hits win), and a second beyond it counts
many times (so the earliest wins).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cluster.scheduler.costs import Estimate
    from cluster.scheduler.fleet import Array

WITHIN = 0.1
"""What a second counts for that keeps to the promise."""
BEYOND = 10.0
"""What a second counts for that breaks it."""
USUAL_WITHIN = 0.01
"""What a second counts for, beside a second of work, where nobody promised anything."""
USUAL_JUMP = 0.1
"""What it counts for to wait longer than is usual, in parts of what is usual."""
USUAL_BEYOND = 0.03
"""What each second beyond that counts for."""
NO_WAIT = 1e-9
"""Seconds: an answer of one token is decoded by nobody, whatever the wait."""


def compute_cost(estimate: Estimate, wish: float | None, usual: float | None) -> Array:
    """Of computing the prompt there: its first token, and the work that whoever comes next finds queued."""
    first_token = estimate.first_token
    if wish is not None or usual is None:
        return _weighed(first_token, wish) + estimate.work
    late = USUAL_JUMP * usual + USUAL_BEYOND * (first_token - usual)
    return USUAL_WITHIN * first_token + (first_token > usual) * late + estimate.work


def decode_cost(estimate: Estimate, wish: float | None) -> Array:
    """Of decoding there: its own answer, the wait for room, and the longer steps of who decodes there already."""
    pace = _weighed(estimate.step, wish) + estimate.rows * estimate.growth
    if wish is not None:
        # Those who decode there were promised as much.
        pace += estimate.rows * BEYOND * np.clip(estimate.step - wish, 0.0, estimate.growth)
    cost = estimate.answer_tokens * pace
    return cost if estimate.room is None else cost + estimate.room


def harm_cost(estimate: Estimate) -> Array:
    """Of computing the prompt where others decode: each of them who still does when its turn comes waits for it."""
    decoding = (estimate.answer_tokens - 1.0) * estimate.step
    return estimate.rows * estimate.prompt * decoding / (decoding + estimate.wait + NO_WAIT)


def _weighed(seconds: Array, wish: float | None) -> Array:
    if wish is None:
        return seconds
    return WITHIN * seconds + (BEYOND - WITHIN) * np.maximum(seconds - wish, 0.0)
