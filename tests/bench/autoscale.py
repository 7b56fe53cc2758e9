"""What moving roles is worth when the load flips: goodput of the autoscaler, of every fixed split and of all-mixed.

    python -m tests.bench.autoscale [--workers 64] [--step 8]      (`make bench-autoscale`)

Virtual time: figures don't depend on the machine. Roles are kept strictly (how=remote): with `auto` a decode worker
computes prompts itself where that is cheaper, so that no split is fixed; `--how auto` shows that too. Splits are tried
in steps, then nearer and nearer to the best. A fixed split's run stops as soon as it can't reach the autoscaler's
goodput / 1.3 any more, and is shown as less than that; --whole runs all to their end. Writes .bench/autoscale.json and
.bench/autoscale.png.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.simulate.cluster import VirtualCluster
from cluster.simulate.constants import Autoscale, Constants, Workers, read_constants
from cluster.simulate.made import FLIP, PHASES
from cluster.simulate.ours import ours
from cluster.simulate.readers import read_trace
from cluster.simulate.summary import is_good, summarise
from tests.bench.results import ROOT, Figure, figure, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from cluster.simulate.asked import Asked
    from cluster.simulate.run import RoleChange, Run

BETTER = 1.3
"""Than the best fixed split, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cluster on the whole trace."""

    name: str
    goodput: float
    whole: bool
    """False: stopped, the goodput is what it could have had at most."""
    late: float = 0.0
    slow: float = 0.0
    refused: float = 0.0
    by_time: tuple[tuple[float, float], ...] = ()
    """Seconds, share of the requests that came then and were good."""
    changes: tuple[RoleChange, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--step", type=int, default=8, help="between the splits that are tried first")
    parser.add_argument("--how", default="remote", choices=("remote", "auto"), help="placement of split clusters")
    parser.add_argument("--whole", action="store_true", help="stop no run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="the folder of tools")
    args = parser.parse_args()
    file = args.shared / "tools/pd_constants.json"
    constants = read_constants(str(file)) if file.exists() else Constants()
    if not file.exists():
        print(f"no {file}: with the simulator's own constants", file=sys.stderr)
    total: int = args.workers
    constants = constants.model_copy(update={"how": args.how})
    with ProcessPoolExecutor(args.jobs) as pool:
        mixed = pool.submit(
            run, total, split(constants.model_copy(update={"how": "auto"}), 0, 0, total), "all mixed", 0.0
        )
        moving = run_from_even(constants, total)
        least = 0.0 if args.whole else moving.goodput / BETTER
        fixed: dict[int, Row] = {}

        def try_all(prefills: Sequence[int]) -> None:
            new = [count for count in prefills if 0 < count < total and count not in fixed]
            jobs: dict[int, Future[Row]] = {}
            for count in new:
                told = split(constants, count, total - count, 0)
                jobs[count] = pool.submit(run, total, told, f"{count}:{total - count}", least)
            fixed.update({count: job.result() for count, job in jobs.items()})

        try_all(range(args.step, total, args.step))
        step: int = args.step
        while step > 1:
            step //= 2
            best = max(fixed, key=lambda count: (fixed[count].goodput, fixed[count].whole))
            try_all((best - step, best + step))
        rows = [moving, mixed.result(), *(fixed[count] for count in sorted(fixed))]
    show(rows)
    draw(Path(ROOT / ".bench"), rows, total)
    report("autoscale", list(figures(rows)))


def split(constants: Constants, prefill: int, decode: int, mixed: int) -> Constants:
    """A cluster of so many of each."""
    return constants.model_copy(update={"workers": Workers(prefill=prefill, decode=decode, mixed=mixed)})


def run_from_even(constants: Constants, total: int) -> Row:
    """The autoscaler begins with as many of both."""
    even = split(constants, total // 2, total - total // 2, 0)
    return run(total, even.model_copy(update={"autoscale": Autoscale(enabled=True)}), "autoscaled", 0.0)


def run(workers: int, constants: Constants, name: str, least: float) -> Row:
    """Until the goodput can't reach `least` any more."""
    trace = read_trace(f"{FLIP}{workers}")
    count, bad = len(trace.requests), 0

    def is_hopeless(asked: Asked) -> bool:
        nonlocal bad
        bad += not is_good(asked, constants.slo)
        return 1 - bad / count < least

    done = VirtualCluster(trace, constants, ours(constants), is_hopeless=is_hopeless).run()
    if 1 - bad / count < least:
        print(f"{name}: less than {least:.1%}", file=sys.stderr, flush=True)
        return Row(name=name, goodput=least, whole=False)
    summary = summarise(done, constants.slo, constants.kv_bytes_per_token)
    print(f"{name}: {summary.goodput:.1%}", file=sys.stderr, flush=True)
    return Row(
        name=name,
        goodput=summary.goodput,
        whole=True,
        late=summary.ttft_missed,
        slow=summary.itl_missed,
        refused=summary.rejected,
        by_time=tuple(by_time(done, lambda asked: is_good(asked, constants.slo))),
        changes=done.role_changes,
    )


def by_time(done: Run, is_right: Callable[[Asked], bool], seconds: float = 5.0) -> Iterator[tuple[float, float]]:
    """The share of those that arrived within each so many seconds."""
    bins: dict[int, list[bool]] = {}
    for asked in done.asked:
        bins.setdefault(int(asked.arrival / seconds), []).append(is_right(asked))
    for place, found in sorted(bins.items()):
        yield (place + 0.5) * seconds, sum(found) / len(found)


def flips() -> list[float]:
    """When phases begin, and when the last one ends."""
    times = [0.0]
    for phase in PHASES:
        times.append(times[-1] + phase.seconds)
    return times


def reversals(changes: Sequence[RoleChange], begin: float, end: float) -> int:
    """How often the direction of moves changed between two flips."""
    roles = [change.role for change in changes if begin <= change.at < end]
    return sum(before != after for before, after in pairwise(roles))


# ---- shown -------------------------------------------------------------------------------------------------


def show(rows: Sequence[Row]) -> None:
    table = Table("cluster", box=None, pad_edge=False)
    for name in ("good %", "late %", "slow %", "refused %"):
        table.add_column(name, justify="right")
    for row in rows:
        rest = [f"{100 * share:.1f}" for share in (row.late, row.slow, row.refused)] if row.whole else ["", "", ""]
        table.add_row(row.name, f"{'' if row.whole else '< '}{100 * row.goodput:.1f}", *rest)
    console = Console(width=120, highlight=False)
    console.print(table)
    moving, mixed, *fixed = rows
    best = max(fixed, key=lambda row: row.goodput)
    times = flips()
    told = [f"{reversals(moving.changes, *span)}" for span in pairwise(times)]
    console.print(
        f"autoscaled / best fixed split ({'' if best.whole else 'less than '}{best.name}): "
        f"{moving.goodput / best.goodput:.3f}, / all mixed: {moving.goodput / mixed.goodput:.3f}; "
        f"{len(moving.changes)} workers moved, reversals after the start and each flip: {', '.join(told)}"
    )


def figures(rows: Sequence[Row]) -> Iterator[Figure]:
    for row in rows:
        yield figure(row.name, "goodput" if row.whole else "goodput, at most", "%", [100 * row.goodput])
    moving, mixed, *fixed = rows
    yield figure("autoscaled", "over the best fixed split", "x", [moving.goodput / max(row.goodput for row in fixed)])
    yield figure("autoscaled", "over all mixed", "x", [moving.goodput / mixed.goodput])
    times = flips()
    for begin, end in pairwise(times):
        yield figure("autoscaled", f"reversals from {begin:g} s", "moves", [reversals(moving.changes, begin, end)])


def draw(folder: Path, rows: Sequence[Row], total: int) -> None:
    """Goodput over time of a few, and the roles below; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure as Picture
    except ImportError:
        print("no matplotlib: no picture", file=sys.stderr)
        return
    moving, mixed, *fixed = rows
    best = max(fixed, key=lambda row: (row.goodput, row.whole))
    picture: Any = Picture(figsize=(9.0, 7.0), dpi=130, layout="constrained")
    above, middle, below = picture.subplots(3, 1)
    for row, colour, width in ((mixed, "#72b7b2", 1.2), (best, "#e45756", 1.2), (moving, "#222222", 2.0)):
        if row.by_time:
            times, shares = zip(*row.by_time, strict=True)
            above.plot(times, [100 * share for share in shares], color=colour, linewidth=width, label=row.name)
    above.set(
        ylabel="good of those that came, %",
        ylim=(0, 103),
        title=f"Long prompts, long answers, long prompts: {total} workers",
    )
    above.legend(frameon=False, fontsize="small", loc="lower left")
    times, counts = [0.0], [total // 2]
    for change in moving.changes:
        times += [change.at, change.at]
        counts += [counts[-1], counts[-1] + (1 if change.role == "prefill" else -1)]
    middle.plot([*times, flips()[-1]], [*counts, counts[-1]], color="#222222", linewidth=2)
    middle.set(xlabel="seconds", ylabel="prefill workers, autoscaled", ylim=(0, total))
    for axes in (above, middle):
        axes.set_xlim(0, flips()[-1])
        for flip in flips()[1:-1]:
            axes.axvline(flip, color="#888888", linestyle="--", linewidth=1)
    marks = [(int(row.name.partition(":")[0]), row) for row in fixed]
    below.plot([at for at, _ in marks], [100 * row.goodput for _, row in marks], color="#e45756", linewidth=1, zorder=1)
    for at, row in marks:
        below.scatter(
            [at], [100 * row.goodput], color="#e45756" if row.whole else "white", edgecolors="#e45756", s=18, zorder=2
        )
    for row, colour in ((moving, "#222222"), (mixed, "#72b7b2")):
        below.axhline(100 * row.goodput, color=colour, linewidth=1.5, label=row.name)
    below.set(
        xlabel="prefill workers of a fixed split (hollow: at most)",
        ylabel="good of all, %",
        xlim=(0, total),
        ylim=(0, 103),
    )
    below.legend(frameon=False, fontsize="small", loc="lower right")
    for axes in (above, middle, below):
        axes.grid(visible=True, color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(exist_ok=True)
    picture.savefig(folder / "autoscale.png")
    print(folder / "autoscale.png")


if __name__ == "__main__":
    main()
