"""`diptych status`: the cluster's workers as a table. Knows the client and the terminal, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Table

from cluster.cli.by_name import status_of_name, takes_name
from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from diptych.client import Client
from diptych.v1.admin_pb2 import Role

if TYPE_CHECKING:
    from diptych.v1.admin_pb2 import GetStatusResponse, WorkerStatus

_COLUMNS: Final = (
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


@click.command(short_help="Workers, roles, blocks, queues and hit rates.", epilog=EXIT_CODES)
@takes_grpc
@takes_name
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def status(target: str, name: str | None, as_json: bool) -> None:
    """Show the cluster's workers: what they run, hold and found in their caches.

    free … lent are KV blocks by state. hit rate is the share of prompt tokens found cached, occupancy the mean number
    of sequences in a decode step, sent the KV bytes handed over.

    \b
    Example:
      diptych status
    """
    with exit_codes():
        cluster = status_of_name(name) if name else _status_at(target)
    if as_json:
        click.echo(MessageToJson(cluster, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    console = Console()
    # A pipe has no width; a table cut to 80 columns would lose what was asked for.
    console = console if console.is_terminal else Console(width=200)
    console.print(_table(cluster), _summary(cluster), sep="\n", highlight=False)


def _status_at(target: str) -> GetStatusResponse:
    with Client(target, timeout_seconds=10) as client:
        return client.status()


def _summary(cluster: GetStatusResponse) -> str:
    ready = "ready" if cluster.ready else "not ready"
    return (
        f"{cluster.model} · {ready} · {cluster.requests_placed} requests placed · {cluster.index_blocks} blocks indexed"
    )


def _table(cluster: GetStatusResponse) -> Table:
    table = Table(box=None, header_style="bold")
    for place, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if place < 2 else "right", no_wrap=place < 2)
    for worker in cluster.workers:
        table.add_row(*_row(worker), style=None if worker.alive else "dim")
    return table


def _row(worker: WorkerStatus) -> list[str]:
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
        Role.Name(worker.info.role).removeprefix("ROLE_").lower(),
        *map(str, numbers),
        f"{counters.prompt_tokens_cached / asked:.0%}" if asked else "-",
        f"{counters.decode_rows / counters.decode_steps:.1f}" if counters.decode_steps else "-",
        str(asked),
        str(counters.tokens_emitted),
        f"{counters.bytes_sent / 1e6:.1f} MB",
        f"{worker.report_age_seconds:.1f} s ago" if worker.alive else "dead",
    ]
