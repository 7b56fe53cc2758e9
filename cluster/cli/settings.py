"""The arguments that make a configuration, shared by the commands that take one. Knows no command."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path

import click

from cluster.config import Config, ConfigError, Override, load


class BadConfiguration(click.ClickException):
    """A configuration that can't be used; exit status 2, as for any misuse."""

    exit_code = 2


FLAGS = {
    "model": "model.name",
    "prefill": "pools.prefill.workers",
    "decode": "pools.decode.workers",
    "mixed": "pools.mixed.workers",
    "http": "front.http",
    "grpc": "front.grpc",
    "fronts": "front.count",
    "device": "device",
}

_OPTIONS = (
    click.argument("file", metavar="[diptych.toml]", required=False, type=click.Path(path_type=Path)),
    click.option("--model", metavar="M", help="Name, .gguf, folder, Hugging Face id or random:SHAPE."),
    click.option("--prefill", metavar="N", help="Prefill workers [1]."),
    click.option("--decode", metavar="N", help="Decode workers [1]."),
    click.option("--mixed", metavar="N", help="Workers that do both [0]."),
    click.option("--http", metavar="HOST:PORT", help="OpenAI API [127.0.0.1:8000]."),
    click.option("--grpc", metavar="HOST:PORT", help="gRPC [127.0.0.1:50051]."),
    click.option("--fronts", metavar="N", help="Front processes, on ports of their own [1]."),
    click.option("--device", metavar="auto|cpu|cuda", help="Where workers compute [auto]."),
    click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any key of `diptych config`."),
)


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the configuration arguments, and its first parameter the Config they make."""

    @wraps(command)
    def configured(file: Path | None, assignments: tuple[str, ...], **options: str | bool | None) -> None:
        flags = {flag: value for flag in FLAGS if isinstance(value := options.pop(flag), str)}
        command(_effective(file, flags, assignments), **options)

    for option in reversed(_OPTIONS):
        configured = option(configured)
    return configured


def _effective(file: Path | None, flags: Mapping[str, str], assignments: tuple[str, ...]) -> Config:
    said = [Override(FLAGS[flag], value, f"--{flag}") for flag, value in flags.items()]
    try:
        return load(file, os.environ, [*said, *map(_assignment, assignments)])
    except ConfigError as error:
        raise BadConfiguration(str(error)) from error


def _assignment(text: str) -> Override:
    key, equals, value = text.partition("=")
    if not equals:
        raise BadConfiguration(f"--set {text}: should be KEY=VALUE, like --set kv.block_size=32")
    return Override(key.strip(), value.strip(), "--set")
