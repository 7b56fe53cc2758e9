"""`diptych serve`: from arguments to a running cluster. Knows nothing of how it is launched."""

from __future__ import annotations

import sys

import click

from cluster.cli.settings import takes_config
from cluster.config import Config


@click.command(short_help="Start a cluster and serve a model.")
@takes_config
@click.option("--detach", is_flag=True, help="Return when it is up; it outlives this command in the Ray it joined.")
def serve(config: Config, *, detach: bool) -> None:
    """Start a cluster and serve a model until Ctrl-C or SIGTERM.

    Joins the Ray that RAY_ADDRESS or `ray job submit` names, or starts one.

    \b
    Example:
      diptych serve --prefill 2 --set placement.how=remote
    """
    from cluster.launch import serve as launch  # Ray loads here, not for --help

    sys.exit(launch(config, detach=detach))
