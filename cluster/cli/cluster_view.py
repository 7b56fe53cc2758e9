"""A cluster's status as tables: totals for `status`, rates for `top`. Knows messages and rich, no connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diptych.v1.admin_pb2 import Role, WorkerCounters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType

    from diptych.v1.admin_pb2 import GetStatusResponse, WorkerStatus

STATUS_COLUMNS: Final = (
    "worker",
    "role",
    "running",
    "waiting",
    "free",
    "cached",
    "held",
    "granted",
    "lent",
    "hit rate",
    "occupancy",
    "prompt tokens",
    "generated",
    "sent",
    "report",
)
_TOP_COLUMNS: Final = ("worker", "role", "run", "wait", "KV in use", "out/s", "in/s", "hit", "batch", "busy")
_BAR_CELLS: Final = 8


# ---- status -----------------------------------------------------------------------------------------


def status_table(cluster: GetStatusResponse, console: Console) -> Table:
    """One row a worker; on a terminal too narrow for that, one column a worker."""
    rows = [_status_row(worker) for worker in cluster.workers]
    styles = [None if worker.alive else "dim" for worker in cluster.workers]
    wide = Table(box=None, header_style="bold", pad_edge=False)
    for place, column in enumerate(STATUS_COLUMNS):
        wide.add_column(column, justify="left" if place < 2 else "right", no_wrap=True)
    for row, style in zip(rows, styles, strict=True):
        wide.add_row(*row, style=style)
    unbounded = console.options.update(width=10_000)
    fits = Measurement.get(console, unbounded, wide).maximum <= console.width
    return wide if fits or not rows else _turned(rows, styles)


def _turned(rows: Sequence[Sequence[str]], styles: Sequence[str | None]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(STATUS_COLUMNS[0], style="bold", no_wrap=True)
    for row, style in zip(rows, styles, strict=True):
        table.add_column(row[0], justify="right", style=style, no_wrap=True)
    for place, column in enumerate(STATUS_COLUMNS[1:], start=1):
        table.add_row(column, *(row[place] for row in rows))
    return table


def summary(cluster: GetStatusResponse) -> str:
    """The cluster in one line."""
    ready = "ready" if cluster.ready else "not ready"
    waiting = sum(queue.length for queue in cluster.queues)
    return (
        f"{cluster.model} · {ready} · {cluster.requests_placed} requests placed · "
        + (f"{waiting} waiting · " if waiting else "")
        + f"{cluster.index_blocks} blocks indexed"
    )


def autoscale_lines(cluster: GetStatusResponse) -> list[str]:
    """What it wants and did last; none where it is off."""
    if not cluster.HasField("autoscale"):
        return []
    told = cluster.autoscale
    wanted = ", ".join(f"{count} {role}" for role, count in sorted(told.wanted.items(), reverse=True))
    changed = ", ".join(f"{why}: {count}" for why, count in sorted(told.changes.items())) or "nothing yet"
    line = f"autoscaler{' (dry run)' if told.dry_run else ''} · wants {wanted} · changed {changed}"
    return [line, *([told.words] if told.words else [])]


def away_lines(cluster: GetStatusResponse) -> list[str]:
    """Who should be there and isn't; none where nobody is away."""
    return [f"{worker.id} is away · {worker.why}" for worker in cluster.away]


def _status_row(worker: WorkerStatus) -> list[str]:
    load, counters = worker.load, worker.counters
    numbers = (
        load.running_requests,
        load.waiting_requests,
        load.blocks_free,
        load.blocks_cached,
        load.blocks_held,
        load.blocks_granted,
        load.blocks_lent,
    )
    asked = counters.prompt_tokens_computed + counters.prompt_tokens_cached
    return [
        worker.info.id,
        _role(worker),
        *map(str, numbers),
        _share(counters.prompt_tokens_cached, asked),
        f"{counters.decode_rows / counters.decode_steps:.1f}" if counters.decode_steps else "-",
        str(asked),
        str(counters.tokens_emitted),
        f"{counters.bytes_sent / 1e6:.1f} MB",
        f"{worker.report_age_seconds:.1f} s ago" if worker.alive else "dead",
    ]


# ---- top --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one worker did between two looks, per second where it says so."""

    generated_per_second: float
    prompt_per_second: float
    finished_per_second: float
    cached_share: float | None
    """Of the prompt tokens; None when there were none."""
    occupancy: float | None
    """Sequences in a decode step; None when there was none."""
    busy: float
    """CPU seconds of the engine's thread, per second."""


def rates(before: WorkerStatus | None, now: WorkerStatus, seconds: float) -> Rates:
    """A worker that is new, or was made again, counts from 0."""
    same = before is not None and before.info.epoch == now.info.epoch
    then, counters = before.counters if before is not None and same else WorkerCounters(), now.counters
    computed = counters.prompt_tokens_computed - then.prompt_tokens_computed
    cached = counters.prompt_tokens_cached - then.prompt_tokens_cached
    steps, decoded = counters.decode_steps - then.decode_steps, counters.decode_rows - then.decode_rows
    return Rates(
        generated_per_second=(counters.tokens_emitted - then.tokens_emitted) / seconds,
        prompt_per_second=(computed + cached) / seconds,
        finished_per_second=(counters.requests_finished - then.requests_finished) / seconds,
        cached_share=cached / (computed + cached) if computed + cached else None,
        occupancy=decoded / steps if steps else None,
        busy=(counters.engine_cpu_seconds - then.engine_cpu_seconds) / seconds,
    )


def all_rates(before: GetStatusResponse | None, now: GetStatusResponse, seconds: float) -> dict[str, Rates]:
    """By worker."""
    known = {worker.info.id: worker for worker in before.workers} if before is not None else {}
    return {worker.info.id: rates(known.get(worker.info.id), worker, seconds) for worker in now.workers}


def top_table(cluster: GetStatusResponse, figures: dict[str, Rates]) -> Table:
    """One row a worker, and the sum."""
    table = Table(box=None, header_style="bold", pad_edge=False, show_footer=len(cluster.workers) > 1)
    footer = _footer(cluster, figures)
    for place, (column, total) in enumerate(zip(_TOP_COLUMNS, footer, strict=True)):
        table.add_column(column, total, justify="left" if place in (0, 1, 4) else "right", no_wrap=True)
    for worker in cluster.workers:
        table.add_row(*_top_row(worker, figures[worker.info.id]), style=None if worker.alive else "dim")
    return table


def _top_row(worker: WorkerStatus, figures: Rates) -> Iterator[RenderableType]:
    yield worker.info.id
    yield _role(worker)
    if not worker.alive:
        yield "dead"
        return
    yield str(worker.load.running_requests)
    yield str(worker.load.waiting_requests)
    yield _kv(worker)
    yield f"{figures.generated_per_second:.0f}"
    yield f"{figures.prompt_per_second:.0f}"
    yield "-" if figures.cached_share is None else f"{figures.cached_share:.0%}"
    yield "-" if figures.occupancy is None else f"{figures.occupancy:.1f}"
    yield f"{figures.busy:.0%}"


def _kv(worker: WorkerStatus) -> Table:
    """A bar, and the share in use: what is cached can be taken like free blocks."""
    load = worker.load
    used = load.blocks_held + load.blocks_granted + load.blocks_lent
    share = used / max(1, worker.info.blocks)
    cell = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    colour = "green" if share < 0.7 else "yellow" if share < 0.9 else "red"
    # A line, so that those of neighbouring rows don't grow together.
    bar = ProgressBar(1.0, share, width=_BAR_CELLS, style="grey30", complete_style=colour, finished_style=colour)
    cell.add_row(bar, Text(f"{share:>4.0%}"))
    return cell


def _footer(cluster: GetStatusResponse, figures: dict[str, Rates]) -> tuple[str, ...]:
    alive = [worker for worker in cluster.workers if worker.alive]
    live = [figures[worker.info.id] for worker in alive]
    return (
        "all",
        f"{len(alive)} up",
        str(sum(worker.load.running_requests for worker in alive)),
        str(sum(worker.load.waiting_requests for worker in alive)),
        "",
        f"{sum(one.generated_per_second for one in live):.0f}",
        f"{sum(one.prompt_per_second for one in live):.0f}",
        "",
        "",
        "",
    )


def _role(worker: WorkerStatus) -> str:
    return Role.Name(worker.info.role).removeprefix("ROLE_").lower()


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
