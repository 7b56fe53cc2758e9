"""Which device of the sender gives which heads to which device of the receiver. Knows layouts, moves nothing.

Two layouts can be bridged when they are of one model: the same layers, heads and head size.
Block sizes, the number of shards, and bf16 and fp32 may differ; fp8 and another may not.
"""

from __future__ import annotations

from diptych.errors import LayoutMismatch
from diptych.types import KvLayout, KvLeg, Wire


def match_legs(source: KvLayout, target: KvLayout) -> tuple[KvLeg, ...]:
    """Every head that a target shard holds comes to it once.

    Of several source shards with the same head neighbours take different ones. Raises
    LayoutMismatch, naming both.
    """
    if source.of_model != target.of_model:
        raise LayoutMismatch(
            f"KV of {source} can't become KV of {target}: layers, heads and head size must agree, and fp8 is for both "
            "or neither"
        )
    return tuple(leg for shard in target.all_shards() for leg in _legs_to(source, shard))


def narrower(source: KvLayout, target: KvLayout) -> Wire:
    """The numbers in which nothing is lost that the receiver could keep."""
    return source.dtype if source.dtype == target.dtype else "bf16"


def _legs_to(source: KvLayout, target: KvLayout) -> list[KvLeg]:
    legs: list[KvLeg] = []
    wanted = target.heads
    while wanted:
        holders = [shard for shard in source.all_shards() if wanted[0] in shard.heads]
        holder = holders[target.shard % len(holders)]
        count = min(wanted.stop, holder.heads.stop) - wanted.start
        legs.append(KvLeg(source=holder.shard, target=target.shard, first_head=wanted.start, heads=count))
        wanted = wanted[count:]
    return legs
