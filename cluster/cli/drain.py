"""`diptych drain`: a worker out of service, without losing a request. Knows the client, not how it is done."""

from __future__ import annotations

import click

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from diptych.client import Client


@click.command(short_help="Take a worker out of service, losing no request.", epilog=EXIT_CODES)
@click.argument("worker")
@click.option("--replace", is_flag=True, help="Start its successor when it has ended: one step of a rolling restart.")
@takes_grpc
def drain(worker: str, replace: bool, target: str) -> None:
    """Give WORKER no new work, let its answers go on elsewhere with their KV, and end it.

    Returns when it has ended. Refused when nobody would be left to serve.

    \b
    Example:
      diptych drain decode-1
    """
    with exit_codes(), Client(target) as client:
        done = client.drain(worker, replace=replace)
    again = " and is back" if replace else ""
    answers = "1 answer" if done.moved == 1 else f"{done.moved} answers"
    click.echo(f"{worker} has ended{again}: {answers} went on elsewhere, {done.seconds:.1f} s")
