"""One thing that was looked at, what was found, and how to mend it. Knows no check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "problem"]
"""A problem stops `diptych serve`; a warning makes it slower, or surprising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`mend` says what to do, and is empty when all is well."""

    about: str
    level: Level
    found: str
    mend: str = ""


def ok(about: str, found: str) -> Finding:
    """As it should be."""
    return Finding(about=about, level="ok", found=found)


def warning(about: str, found: str, mend: str) -> Finding:
    """`diptych serve` starts all the same."""
    return Finding(about=about, level="warning", found=found, mend=mend)


def problem(about: str, found: str, mend: str) -> Finding:
    """`diptych serve` would fail."""
    return Finding(about=about, level="problem", found=found, mend=mend)
