"""Results as tables for a person and as JSON. Knows figures, no simulation."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.simulate.compare import Result
    from cluster.simulate.plan import Plan
    from cluster.simulate.prefill_only import Placed

_COLUMNS = (
    "policy",
    "speed",
    "good %",
    "late %",
    "slow %",
    "hit %",
    "TTFT p50 s",
    "p99 s",
    "ITL p50 ms",
    "p99 ms",
    "remote/local/mixed",
    "sent GB",
    "saved GB",
    "decode max/min",
    "busy %",
)


def result_table(results: Sequence[Result]) -> Table:
    """A row for each policy and speed."""
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    for result in results:
        table.add_row(*_cells(result))
    return table


def _cells(result: Result) -> list[str]:
    one = result.summary
    ways = "/".join(str(one.how.get(how, 0)) for how in ("remote", "local", "mixed"))
    return [
        result.policy,
        f"{'≤ ' if result.highest else ''}{result.speed:.4g}",
        f"{100 * one.goodput:.1f}",
        f"{100 * one.ttft_missed:.1f}",
        f"{100 * one.itl_missed:.1f}",
        f"{100 * one.hit_rate:.1f}",
        f"{one.ttft_p50:.2f}",
        f"{one.ttft_p99:.2f}",
        f"{1000 * one.itl_p50:.1f}",
        f"{1000 * one.itl_p99:.1f}",
        ways,
        f"{one.sent_bytes / 1e9:,.0f}",
        f"{one.unsent_bytes / 1e9:,.0f}",
        f"{one.decode_load:.2f}",
        "/".join(f"{100 * one.busy[role]:.0f}" for role in ("prefill", "decode", "mixed")),
    ]


def result_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """As the table, in SI units."""
    return [
        {
            "policy": result.policy,
            "weights": result.weights,
            "speed": result.speed,
            "highest": result.highest,
            **asdict(result.summary),
        }
        for result in results
    ]


def plan_table(plans: Sequence[Plan]) -> Table:
    """For each speed the pools that keep the SLO, and what one worker less makes of it."""
    table = Table(box=None, pad_edge=False)
    columns = ("requests/s", "speed", "prefill", "decode", "", "good %", "late %", "slow %", "TTFT p99 s", "ITL p99 ms")
    for name in columns:
        table.add_column(name, justify="left" if not name else "right")
    for one in plans:
        for pools, result in ((one.pools, one.result), *one.smaller):
            good = result.summary
            table.add_row(
                f"{len(result.run.asked) / max(1e-9, result.run.asked[-1].arrival):.1f}",
                f"{one.speed:.4g}",
                str(pools.prefill),
                str(pools.decode),
                "keeps the SLO" if pools == one.pools else "one less",
                f"{100 * good.goodput:.1f}",
                f"{100 * good.ttft_missed:.1f}",
                f"{100 * good.itl_missed:.1f}",
                f"{good.ttft_p99:.2f}",
                f"{1000 * good.itl_p99:.1f}",
            )
    return table


def plan_json(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """As the table, in SI units."""
    return [
        {
            "speed": one.speed,
            "prefill": pools.prefill,
            "decode": pools.decode,
            "chosen": pools == one.pools,
            **asdict(result.summary),
        }
        for one in plans
        for pools, result in ((one.pools, one.result), *one.smaller)
    ]


def placed_table(results: Sequence[Placed]) -> Table:
    """A row for each policy."""
    table = Table("policy", box=None, pad_edge=False)
    for name in ("block hit rate", "max/mean work", "delay p50 s", "p99 s"):
        table.add_column(name, justify="right")
    for one in results:
        figures = (
            f"{100 * one.hit_rate:.1f} %",
            f"{one.imbalance:.2f}",
            f"{one.delay_p50:.1f}",
            f"{one.delay_p99:.1f}",
        )
        table.add_row(one.policy, *figures)
    return table


def weights_used(results: Sequence[Result | Placed]) -> list[str]:
    """A line for each policy that has weights."""
    return list(dict.fromkeys(f"{result.policy}: {result.weights}" for result in results if result.weights))


def against(results: Sequence[Result]) -> list[str]:
    """How much faster ours can go than the others, where the highest speeds are known."""
    speeds = {result.policy: result.speed for result in results if result.highest}
    ours = speeds.pop("ours", None)
    if ours is None or not speeds:
        return []
    best = max(speeds, key=speeds.__getitem__)
    told = [f"ours bears {ours / speeds[best]:.2f}x the speed of the best of the others ({best})"]
    if "round_robin" in speeds and best != "round_robin":
        told.append(f"ours bears {ours / speeds['round_robin']:.2f}x the speed of round_robin")
    return told
