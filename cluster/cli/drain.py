"""`diptych drain`: a part out of service, without losing a request. Knows the client, not how it is done."""

from __future__ import annotations

import click

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from diptych.client import Client


@click.command(short_help="Take a worker out of service, losing no request.", epilog=EXIT_CODES)
@click.argument("worker", required=False)
@click.option("--node", metavar="NODE", help="All workers of a Ray node (address or id).")
@click.option("--replace", is_flag=True, help="A successor takes its place; a front's or the scheduler's comes first.")
@takes_grpc
def drain(worker: str | None, node: str | None, replace: bool, target: str) -> None:
    """Give WORKER no new work, let its answers go on elsewhere with their KV, and end it.

    Returns when it has ended; refused when nobody would be left to serve. `front-N` and `scheduler` need --replace.
    A --node's workers get successors on other nodes; who can't be done without stays until one is up.

    \b
    Example:
      diptych drain decode-1
      diptych drain front-0 --replace
      diptych drain --node 10.0.0.7
    """
    if bool(worker) == bool(node):
        raise click.UsageError("say which WORKER, or which --node")
    if node and replace:
        raise click.UsageError("--node's workers always get successors, elsewhere: leave --replace out")
    with exit_codes(), Client(target) as client:
        done = client.drain(worker, replace=replace) if worker else client.drain_node(node or "")
    if node:
        ended = f"{', '.join(done.ended)} ended" if done.ended else "no worker was there"
        click.echo(f"{node}: {ended}, {_answers(done.moved)} went on elsewhere, {done.seconds:.1f} s")
        return
    assert worker
    if worker == "scheduler" or worker.startswith("front-"):
        click.echo(f"{worker} has a successor, {done.seconds:.1f} s")
        return
    again = " and is back" if replace else ""
    click.echo(f"{worker} has ended{again}: {_answers(done.moved)} went on elsewhere, {done.seconds:.1f} s")


def _answers(count: int) -> str:
    return "1 answer" if count == 1 else f"{count} answers"
