"""Where values come from: defaults, then the file, the environment, the command line. Knows no key by name."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pydantic import ValidationError

from cluster.config.errors import ConfigError
from cluster.config.schema import Config, keys, sections

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENVIRONMENT_PREFIX = "DIPTYCH_"


class Override(NamedTuple):
    """One value set somewhere, on its way into the configuration."""

    key: str
    """Dotted: `pools.prefill.workers`."""
    value: object
    origin: str
    """Who said so, as the user would name it: `--prefill`, a file, a variable."""


def load(
    file: Path | None = None, environment: Mapping[str, str] | None = None, overrides: Iterable[Override] = ()
) -> Config:
    """The effective configuration; later layers win. Raises ConfigError with every problem found."""
    layers = [
        *(_from_file(file) if file else ()),
        *_from_environment(environment or {}),
        *overrides,
    ]
    if problems := tuple(problem for item in layers if (problem := _misnamed(item))):
        raise ConfigError(problems)
    chosen = {item.key: item for item in layers}
    origins = {key: item.origin for key, item in chosen.items()}
    try:
        return Config.model_validate(_nested(chosen.values()), context=origins)
    except ValidationError as error:
        raise ConfigError(tuple(_explain(detail, chosen) for detail in error.errors())) from None


def _from_file(file: Path) -> list[Override]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError((f"{file} can't be read: {error}",)) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError((f"{file} is not valid TOML: {error}",)) from error
    return [Override(key, value, str(file)) for key, value in _flat(table, "", sections())]


def _flat(table: Mapping[str, Any], prefix: str, known: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = prefix + name
        if key in known and isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), f"{key}.", known)
        else:
            yield key, value


def _from_environment(environment: Mapping[str, str]) -> list[Override]:
    """`DIPTYCH_MODEL__NAME` sets `model.name`.

    Other names that start like ours are left alone: Kubernetes sets `DIPTYCH_PORT` and the like
    beside a Service called diptych, and no such name has a double underscore.
    """
    found: list[Override] = []
    for name, value in environment.items():
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        if name.startswith(ENVIRONMENT_PREFIX) and ("." in key or key in keys()):
            found.append(Override(key, value, f"environment {name}"))
    return found


def _misnamed(item: Override) -> str | None:
    if item.key in keys():
        return None
    if item.key in sections():
        inner = [key for key in keys() if key.startswith(f"{item.key}.")]
        return f"{item.key} ({item.origin}): is a section; set {_listed(inner)}"
    return f"{item.key} ({item.origin}): is not a key; the nearest is {_nearest(item.key)}"


def _nearest(key: str) -> str:
    """The key or section most like the one given, as a whole or by its last word (`http` is front.http)."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    return max([*keys(), *sorted(sections())], key=likeness)


def _nested(items: Iterable[Override]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for item in items:
        *path, name = item.key.split(".")
        table = tree
        for part in path:
            table = table.setdefault(part, {})
        table[name] = item.value
    return tree


def _explain(detail: ErrorDetails, chosen: Mapping[str, Override]) -> str:
    """One line for one problem; a problem between keys names the keys that were set."""
    parts = [str(part) for part in detail["loc"]]
    key = next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in chosen), None)
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if key is not None:
        return f"{key} = {chosen[key].value!r} ({chosen[key].origin}): {message}"
    section = ".".join(parts)
    said = [item for name, item in chosen.items() if not section or name.startswith(f"{section}.")]
    told = _listed([f"{item.key} = {item.value!r} ({item.origin})" for item in said])
    return f"{message}; set: {told}" if told else message


def _listed(words: list[str]) -> str:
    return ", ".join(words)
