"""Where a front places a request while no scheduler answers. Pure; knows only what this front sent itself.

The rule: where fewest of its own requests are. Only as many as their workers' KV has room for: the
others wait for the scheduler's successor, which is up in seconds.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from diptych.types import Placement

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from cluster.scheduler.costs import RequestShape, Rule
    from diptych.types import Role, WorkerInfo


class Own(NamedTuple):
    """One of this front's requests under way."""

    placement: Placement
    context: int
    """The longest it can become, in tokens."""


def place_alone(
    shape: RequestShape, workers: Collection[WorkerInfo], own: Iterable[Own], how: Rule
) -> Placement | None:
    """None when no worker has room beside what this front sent it."""
    requests, tokens = Counter[str](), Counter[str]()
    for placement, context in own:
        tokens[placement.decode] += context
        requests.update(filter(None, (placement.prefill, placement.decode)))

    def least(*roles: Role, context: int, needed: int) -> WorkerInfo | None:
        fits = [
            worker
            for worker in workers
            if worker.role in roles
            and worker.max_context >= context
            and tokens[worker.id] + needed <= worker.blocks * worker.layout.block_size
        ]
        return min(fits, key=lambda worker: (requests[worker.id], worker.id), default=None)

    prefill = None if how == "local" else least("prefill", context=shape.prompt_tokens, needed=0)
    if prefill is None and how == "remote":
        return None
    decode = least("decode", context=shape.context, needed=shape.context)
    if decode is None:
        decode, prefill = least("mixed", context=shape.context, needed=shape.context), None
    if decode is None:
        return None
    return Placement(
        decode=decode.id,
        prefill=prefill.id if prefill else None,
        how="remote" if prefill else "mixed" if decode.role == "mixed" else "local",
        reason="no scheduler answered: where this front has fewest requests of its own",
    )
