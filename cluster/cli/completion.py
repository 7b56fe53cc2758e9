"""`diptych completion`: what makes a shell complete our commands. Knows click's shells, no cluster."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_VARIABLE = "_DIPTYCH_COMPLETE"
"""click's own name for it: the script sets it, and the command answers with candidates."""


@click.command(short_help="Shell completion for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete diptych's commands and options.

    \b
    Example:
      diptych completion bash > ~/.local/share/bash-completion/completions/diptych
      diptych completion zsh > "${fpath[1]}/_diptych"
      diptych completion fish > ~/.config/fish/completions/diptych.fish

    Exit codes: 0 done, 2 wrong usage.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click has these three"
    complete = kind(context.find_root().command, {}, "diptych", _VARIABLE)
    click.echo(complete.source_template % complete.source_vars())
