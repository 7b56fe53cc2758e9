"""`diptych serve`: from arguments to a running cluster. Knows nothing of how it is launched."""

from __future__ import annotations

import sys

import click

from cluster.cli.settings import takes_config
from cluster.config import Config


@click.command(short_help="Start a cluster and serve a model.")
@takes_config
def serve(config: Config) -> None:
    """Start a cluster and serve a model until Ctrl-C or SIGTERM.

    \b
    Example:
      diptych serve --prefill 2 --set placement.how=remote
    """
    from cluster.launch import serve as launch  # Ray loads here, not for --help

    sys.exit(launch(config))
