"""`diptych status`: the cluster's workers as a table. Knows the client and the terminal, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from google.protobuf.json_format import MessageToJson
from rich.console import Console

from cluster.cli.by_name import status_of_name, takes_name
from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from cluster.cli.cluster_view import autoscale_lines, away_lines, status_table, summary
from diptych.client import Client

if TYPE_CHECKING:
    from diptych.v1.admin_pb2 import GetStatusResponse

PIPE_COLUMNS = 200
"""A pipe has no width; a table cut to 80 columns would lose what was asked for."""


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
    console = console if console.is_terminal else Console(width=PIPE_COLUMNS)
    console.print(
        status_table(cluster, console),
        summary(cluster),
        *away_lines(cluster),
        *autoscale_lines(cluster),
        sep="\n",
        highlight=False,
        markup=False,
    )


def _status_at(target: str) -> GetStatusResponse:
    with Client(target, timeout_seconds=10) as client:
        return client.status()
