"""Lines about a running cluster: text for people, JSON for programs. Knows no process and no Ray."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, TypeAlias

from cluster.terminal import Terminal

if TYPE_CHECKING:
    from cluster.config.schema import Log

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
FIELDS: Final = "diptych_fields"
"""Where a record of `logging` carries an entry's fields."""
LEVELS: Final[tuple[Level, ...]] = ("debug", "info", "warning", "error")


class Entry(NamedTuple):
    """One line, before anyone decides how it looks; picklable."""

    at: float
    """Seconds since 1970."""
    level: Level
    source: str
    """The process that says it."""
    message: str
    fields: dict[str, object]
    """Numbers, words or None, by name."""


class Say(Protocol):
    """How a part of the cluster tells what happened."""

    def __call__(self, message: str, level: Level = "info") -> None: ...


class Journal:
    """Writes entries from `log.level` on, as `log.format` says."""

    def __init__(self, log: Log, terminal: Terminal, source: str = "launcher") -> None:
        self._least = LEVELS.index(log.level)
        self._json = log.format == "json"
        self._terminal = terminal
        self._source = source

    def say(self, message: str, level: Level = "info") -> None:
        """Of this process."""
        self.add(Entry(time.time(), level, self._source, message, {}))

    def fail(self, message: str) -> None:
        """Why the command ends: its last line, which has to be understood without any other."""
        entry = Entry(time.time(), "error", self._source, message, {})
        self._terminal.tell(as_json(entry) if self._json else f"error: {message}")

    def add(self, entry: Entry) -> None:
        """Of any process."""
        if LEVELS.index(entry.level) >= self._least:
            shown = as_json(entry) if self._json else as_text(entry, self._source)
            self._terminal.tell(entry.message, shown)


def as_text(entry: Entry, speaker: str) -> str:
    """`18:50:00.123 front-0 request ends status=200`; the speaker's own lines don't say who speaks."""
    words = [datetime.fromtimestamp(entry.at).strftime("%H:%M:%S.%f")[:-3]]
    words += [] if entry.source == speaker else [entry.source]
    words += [] if entry.level == "info" else [f"{entry.level}:"]
    given = {name: value for name, value in entry.fields.items() if value is not None}
    trace = given.pop("traceback", None)
    words += [entry.message, *(f"{name}={_word(value)}" for name, value in given.items())]
    return " ".join(words) + (f"\n{trace}" if trace else "")


def as_json(entry: Entry) -> str:
    """One object without nested ones: time (RFC 3339, UTC), level, source, message and the entry's own fields."""
    at = datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    said = {"time": at, "level": entry.level, "source": entry.source, "message": entry.message}
    given = {name: value for name, value in entry.fields.items() if value is not None}
    return json.dumps({**said, **given}, ensure_ascii=False)


def _word(value: object) -> str:
    """In quotes where it would read as several."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text, ensure_ascii=False)
