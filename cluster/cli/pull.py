"""`diptych pull`: a model's files on this machine before anyone waits for them."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from cluster.config import Config
from diptych.errors import UnknownModel


@click.command(short_help="Fetch a model and say where it lies.")
@click.argument("model", default=Config().model.name)
@click.option("--json", "as_json", is_flag=True, help="Print name, path and digest as one JSON object.")
def pull(model: str, *, as_json: bool) -> None:
    """Fetch MODEL (the default model when left out) and say where it lies.

    MODEL is a known name, a .gguf file, a folder or a Hugging Face id.

    \b
    Example:
      diptych pull smollm2-135m-instruct
    """
    from cluster.models import resolve
    from cluster.terminal import Terminal

    try:
        with Terminal() as terminal:
            source = resolve(model, progress=terminal.tell)
    except UnknownModel as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(asdict(source)) if as_json else source.path)
