"""`diptych stop`: ends a detached cluster. Knows the terminal, not how a cluster ends."""

from __future__ import annotations

import click

from cluster.cli.by_name import stop_by_name
from cluster.cli.calling import exit_codes
from cluster.config import Config


@click.command(
    short_help="End a detached cluster.",
    epilog="Exit codes: 0 nothing of it is left, 1 no such cluster or no such Ray, 2 wrong usage.",
)
@click.option("--name", metavar="NAME", default=Config().cluster.name, show_default=True, help="cluster.name of it.")
def stop(name: str) -> None:
    """End a detached cluster: answers under way have a grace of seconds, then everything of it is gone.

    It is found by its name in the Ray at RAY_ADDRESS. A cluster that isn't detached ends with Ctrl-C, SIGTERM or
    `ray job stop`.

    \b
    Example:
      RAY_ADDRESS=10.0.0.5:6379 diptych stop --name diptych
    """
    with exit_codes():
        stop_by_name(name)
    click.echo(f"{name} has stopped")
