"""`diptych config`: what a cluster would run with, and who said so."""

from __future__ import annotations

import json

import click

from cluster.cli.settings import takes_config
from cluster.config import Config, values


@click.command(short_help="The whole effective configuration and where it came from.")
@takes_config
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(effective: Config, *, as_json: bool) -> None:
    """Print the whole effective configuration and where each value came from.

    \b
    Example:
      diptych config diptych.toml --set kv.memory=512MiB
    """
    (_print_json if as_json else _print_table)(effective)


def _print_json(effective: Config) -> None:
    told = {key: {"value": value, "origin": effective.origin(key)} for key, value in values(effective).items()}
    click.echo(json.dumps(told, indent=2))


def _print_table(effective: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "value", "from", box=None, pad_edge=False)
    for key, value in values(effective).items():
        origin = effective.origin(key)
        table.add_row(key, str(value), origin, style="dim" if origin == "default" else None)
    Console(highlight=False, markup=False).print(table)
