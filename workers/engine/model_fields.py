"""Metadata from one file, read by name and type. Knows no architecture.

What nobody asked for by the end is unknown: it may change the maths, so it is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from workers.engine.model_config import UnsupportedModel

_REQUIRED = object()


class Fields:
    """`where` is the file, and the place in it if there are several. Null is as good as absent."""

    def __init__(self, where: str, values: Mapping[str, Any], *, prefix: str = "") -> None:
        self.where = where
        self._values = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        self._prefix = prefix
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether it is there, be it null."""
        return name in self._values

    def integer(self, name: str, default: object = _REQUIRED) -> int:
        """A number of things: 1 or more."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
            raise self.wrong(name, "a whole number above 0")
        return int(value)

    def integer_or_none(self, name: str) -> int | None:
        """As `integer`, where it may be absent."""
        return None if self._take(name, None) is None else self.integer(name)

    def number(self, name: str, default: object = _REQUIRED) -> float:
        """A positive number."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.wrong(name, "a number above 0")
        return float(value)

    def number_or_none(self, name: str, default: float | None = None) -> float | None:
        """As `number`, where it may be absent (then `default`) or null (then None)."""
        if not self.has(name):
            return default
        return None if self._take(name, None) is None else self.number(name)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A word."""
        value = self._take(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "text")
        return value

    def raw(self, name: str) -> object:
        """Whatever is there, or None."""
        return self._take(name, None)

    def items(self, name: str) -> list[Any] | None:
        """A list, if it is there."""
        value = self._take(name, None)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value  # pyright: ignore[reportUnknownVariableType]

    def group(self, name: str) -> dict[str, Any] | None:
        """Fields of its own, if they are there."""
        value = self._take(name, None)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "a group of fields")
        return value  # pyright: ignore[reportUnknownVariableType]

    def plain(self, name: str, *values: object) -> None:
        """It changes the maths, unless it is absent, null or one of these."""
        if self._take(name, None) not in (None, *values):
            raise self.wrong(name, " or ".join(f"{value!r}" for value in values) if values else "left out")

    def ignore(self, *names: str) -> None:
        """These say nothing to this model, whatever they say."""
        self._read.update(names)

    def refuse_unread(self, harmless: Collection[str] = ()) -> None:
        """Raises for the first fields that nobody asked for and that aren't known to be harmless."""
        unknown = sorted(self._values.keys() - self._read - set(harmless))
        unknown = [name for name in unknown if self._values[name] is not None]
        if unknown:
            told = ", ".join(f"{self._prefix}{name}={_short(self._values[name])}" for name in unknown[:4])
            raise UnsupportedModel(
                f"{self.where}: {told}{', …' if unknown[4:] else ''}: not known to this version, and may change the "
                f"maths; a model whose answers don't depend on it works without it"
            )

    def wrong(self, name: str, works: str) -> UnsupportedModel:
        """The error that says what is there and what works instead."""
        value = _short(self._values.get(name))
        return UnsupportedModel(f"{self.where}: {self._prefix}{name}={value} is not supported; what works: {works}")

    def _take(self, name: str, default: object) -> Any:  # noqa: ANN401 (JSON)
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise UnsupportedModel(f"{self.where}: {self._prefix}{name} is missing")
        return default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
