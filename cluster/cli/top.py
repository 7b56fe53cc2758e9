"""`diptych top`: what every worker does now, again and again. Knows the client and the terminal, nothing else."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import time
import tty
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cluster.cli.calling import EXIT_CODES, exit_codes, takes_grpc
from cluster.cli.cluster_view import all_rates, summary, top_table
from cluster.cli.status import PIPE_COLUMNS
from diptych.client import Client, Unreachable
from diptych.errors import ServingError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from cluster.cli.cluster_view import Rates
    from diptych.v1.admin_pb2 import GetStatusResponse

_ANSWER_SECONDS = 5.0


@click.command(short_help="What every worker does now, refreshed.", epilog=EXIT_CODES)
@takes_grpc
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Look twice, print once and end; so it is without a terminal.")
@click.option("--json", "as_json", is_flag=True, help="As --once, but print JSON.")
def top(target: str, every: float, once: bool, as_json: bool) -> None:
    """Show what every worker does now, until q or Ctrl-C.

    out/s and in/s are tokens generated and prompt tokens read, hit the share of those found cached, batch the mean
    number of sequences in a decode step, busy the engine thread's CPU. KV in use leaves out what is only cached.

    \b
    Example:
      diptych top --every 2
    """
    console = Console()
    with exit_codes(), Client(target, timeout_seconds=_ANSWER_SECONDS) as client:
        if once or as_json or not console.is_terminal:
            _print_once(client, every, as_json=as_json)
        else:
            _refresh(client, target, every, console)


@dataclass(frozen=True, slots=True)
class _Look:
    """The cluster at one moment."""

    cluster: GetStatusResponse
    at: float


def _look(client: Client) -> _Look:
    return _Look(client.status(), time.monotonic())


def _print_once(client: Client, every: float, *, as_json: bool) -> None:
    before = _look(client)
    select.select([], [], [], every)
    now = _look(client)
    figures = all_rates(before.cluster, now.cluster, now.at - before.at)
    if as_json:
        click.echo(json.dumps({worker: asdict(one) for worker, one in figures.items()}, indent=2))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=PIPE_COLUMNS)
    console.print(summary(now.cluster), top_table(now.cluster, figures), sep="\n", highlight=False)


def _refresh(client: Client, target: str, every: float, console: Console) -> None:
    """The first look has to come; afterwards a cluster that doesn't answer is waited for."""
    last = _look(client)
    figures = all_rates(None, last.cluster, float("inf"))
    trouble = ""
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(target, every, last.cluster, figures, trouble), refresh=True)
            if pressed(every) in ("q", "Q", "\x04"):
                return
            try:
                now = _look(client)
            except (Unreachable, ServingError) as error:
                trouble = str(error)
                continue
            figures = all_rates(last.cluster, now.cluster, now.at - last.at)
            last, trouble = now, ""


def _screen(target: str, every: float, cluster: GetStatusResponse, figures: dict[str, Rates], trouble: str) -> Group:
    state = Text(trouble or summary(cluster), style="bold red" if trouble else "bold")
    hint = Text(f"{target} · {time.strftime('%H:%M:%S')} · every {every:g} s · q ends", style="dim")
    return Group(state, "", top_table(cluster, figures), "", hint)


@contextmanager
def _keys() -> Generator[Callable[[float], str]]:
    """A function that waits so many seconds for a key: "" when none was pressed."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    keyboard = sys.stdin.fileno()
    before: Any = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([keyboard], [], [], seconds)
        return os.read(keyboard, 1).decode(errors="replace") if ready else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    select.select([], [], [], seconds)
    return ""
