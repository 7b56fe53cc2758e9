"""The `diptych` command and its subcommands' names. Knows what they are called, not what they do."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import click

from diptych import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping


class Subcommand(NamedTuple):
    """Where a subcommand lives and what it does, so that `--help` loads none of them."""

    module: str
    summary: str


SUBCOMMANDS = {
    "serve": Subcommand("cluster.cli.serve", "Start a cluster and serve a model."),
    "ask": Subcommand("cluster.cli.ask", "One streamed answer over gRPC."),
    "status": Subcommand("cluster.cli.status", "Workers, roles, blocks, queues and hit rates."),
    "stop": Subcommand("cluster.cli.stop", "End a detached cluster."),
    "top": Subcommand("cluster.cli.top", "What every worker does now, refreshed."),
    "explain": Subcommand("cluster.cli.explain", "Why a request ran where it did."),
    "drain": Subcommand("cluster.cli.drain", "Take a worker out of service, losing no request."),
    "role": Subcommand("cluster.cli.role", "Make a worker prefill, decode or both from now on."),
    "scale": Subcommand("cluster.cli.scale", "Start or drain workers of a pool."),
    "pull": Subcommand("cluster.cli.pull", "Fetch a model and say where it lies."),
    "config": Subcommand("cluster.cli.config", "The whole effective configuration and where it came from."),
    "replay": Subcommand("cluster.cli.replay", "A trace on a live cluster."),
    "simulate": Subcommand("cluster.cli.simulate", "The real scheduler against virtual workers in virtual time."),
    "doctor": Subcommand("cluster.cli.doctor", "Check this machine and say how to mend it."),
    "completion": Subcommand("cluster.cli.completion", "Shell completion for bash, zsh or fish."),
}


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are called: `--help` stays quick."""

    def __init__(self, *, subcommands: Mapping[str, Subcommand], name: str, help: str) -> None:  # noqa: A002  (click's)
        super().__init__(name=name, help=help)
        self._subcommands = subcommands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._subcommands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        subcommand = self._subcommands.get(cmd_name)
        if subcommand is None:
            return None
        command: object = getattr(import_module(subcommand.module), cmd_name)
        assert isinstance(command, click.Command), f"{subcommand.module}.{cmd_name} is not a command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in self._subcommands.items()])


diptych = click.version_option(__version__, message="%(prog)s %(version)s")(
    LazyGroup(
        name="diptych",
        subcommands=SUBCOMMANDS,
        help="""A disaggregated LLM serving cluster.

        \b
        Example:
          diptych serve
          diptych ask "What is the capital of France?"
        """,
    )
)


def main() -> None:
    """The console script's entry."""
    diptych(prog_name="diptych")
