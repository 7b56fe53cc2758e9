"""`diptych role`: what a worker does from now on. Knows the client, not how it is done."""

from __future__ import annotations

import click

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from diptych.client import Client


@click.command(short_help="Make a worker prefill, decode or both from now on.", epilog=EXIT_CODES)
@click.argument("worker")
@click.argument("role", type=click.Choice(("prefill", "decode", "mixed")))
@takes_grpc
def role(worker: str, role: str, target: str) -> None:
    """Give WORKER another ROLE. Its weights and its cache stay, and what it has begun it ends.

    Its name stays too: roles are a state. Refused when nobody would be left to decode.

    \b
    Example:
      diptych role prefill-1 decode
    """
    with exit_codes(), Client(target) as client:
        done = client.set_role(worker, role)
    click.echo(f"{worker} is a {role} worker now, {1e3 * done.seconds:.0f} ms")
