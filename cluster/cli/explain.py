"""`diptych explain`: why a request ran where it did, and how that went. Knows the client and the terminal."""

from __future__ import annotations

import click
from google.protobuf.json_format import MessageToJson
from rich.console import Console

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from cluster.cli.explain_view import told
from diptych.client import Client

_PIPE_COLUMNS = 120


@click.command(short_help="Why a request ran where it did.", epilog=EXIT_CODES)
@click.argument("request_id")
@takes_grpc
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def explain(request_id: str, target: str, as_json: bool) -> None:
    """Show where REQUEST_ID ran and why, what else was possible, and how it went.

    The id is what an answer's x-request-id header says, or the `id` of an OpenAI answer, or request_id of a gRPC one.
    Only the latest requests are kept.

    \b
    Example:
      diptych explain chatcmpl-3f6c…
    """
    with exit_codes(), Client(target, timeout_seconds=10) as client:
        response = client.explain(request_id)
    if as_json:
        click.echo(MessageToJson(response, preserving_proto_field_name=True))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=_PIPE_COLUMNS)
    for explanation in response.explanations:
        for part in told(explanation):
            console.print(part, highlight=False, markup=False)
