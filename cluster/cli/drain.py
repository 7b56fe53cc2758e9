"""`diptych drain`: a part out of service, without losing a request. Knows the client, not how it is done."""

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

    `front-0` and the like, and `scheduler`, can be given a successor (--replace): a front's is on its ports before it
    ends the answers that it has begun; the command returns when the successor serves.

    \b
    Example:
      diptych drain decode-1
      diptych drain front-0 --replace
    """
    with exit_codes(), Client(target) as client:
        done = client.drain(worker, replace=replace)
    if worker == "scheduler" or worker.startswith("front-"):
        click.echo(f"{worker} has a successor, {done.seconds:.1f} s")
        return
    again = " and is back" if replace else ""
    answers = "1 answer" if done.moved == 1 else f"{done.moved} answers"
    click.echo(f"{worker} has ended{again}: {answers} went on elsewhere, {done.seconds:.1f} s")
