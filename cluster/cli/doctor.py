"""`diptych doctor`: whether `serve` would work here, and what to do when not. Knows the terminal, no check."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from cluster.cli.settings import takes_config
from cluster.config import Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.doctor.finding import Finding

_MARKS: Final = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "bold red")}
PIPE_COLUMNS: Final = 120


@click.command(
    short_help="Check this machine and say how to mend it.",
    epilog="Exit codes: 0 serve would start, 1 something would stop it, 2 wrong usage.",
)
@takes_config
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(effective: Config, *, as_json: bool) -> None:
    """Check whether `diptych serve` would work here with these settings.

    \b
    Example:
      diptych doctor --prefill 2
    """
    from cluster.cache import cache_folder
    from cluster.doctor.machine import check_machine
    from cluster.doctor.software import check_software

    findings = [
        *check_machine(effective, os.environ, cache_folder()),
        *check_software(effective, os.environ, Path.home(), cache_folder()),
    ]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    sys.exit(1 if any(finding.level == "problem" for finding in findings) else 0)


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.level]
        said = Text(finding.found)
        if finding.mend:
            said.append(f"\n→ {finding.mend}", style="cyan")
        table.add_row(Text(mark, style=style), finding.about, said)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=PIPE_COLUMNS, highlight=False)
    console.print(table, "", _verdict(findings), sep="\n")


def _verdict(findings: Sequence[Finding]) -> str:
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    told = f"{warnings} {'warning' if warnings == 1 else 'warnings'}"
    if problems:
        return f"{problems} {'problem' if problems == 1 else 'problems'} would stop diptych serve; {told}"
    return f"diptych serve would start here; {told}"
