"""A sign of life while something long runs. Knows no step by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

EVERY_SECONDS = 2.0
"""The longest silence while something is done."""
_LOOK_SECONDS = 0.2


class Step(str):
    """A line that also says how much of the whole is done, so that a terminal can draw it. A whole of 0 is unknown."""

    __slots__ = ("part", "whole")
    part: int
    whole: int

    def __new__(cls, line: str, part: int, whole: int = 0) -> Step:
        made = super().__new__(cls, line)
        made.part, made.whole = part, whole
        return made

    def __reduce__(self) -> tuple[object, ...]:
        return Step, (str(self), self.part, self.whole)


@contextmanager
def watched(progress: Callable[[str], None], describe: Callable[[], Step]) -> Generator[None]:
    """Says `describe()` several times a second while the body runs.

    A thread watches and the body stays where it is, so that Ctrl-C still reaches the body.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            progress(describe())

    watcher = threading.Thread(target=watch, name="diptych-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(timeout=EVERY_SECONDS)


def megabytes(size_bytes: int) -> str:
    """As in "94 MB"."""
    return f"{size_bytes / 1e6:.0f} MB"


def percent(part: int, whole: int) -> str:
    """As in "37 %", never above 100."""
    return f"{min(100, 100 * part // max(1, whole))} %"


def largest_file_bytes(folder: Path) -> int:
    """Size of the largest file below `folder`, while others create and delete files and folders in it."""
    return max(map(_size_bytes, _files(folder)), default=0)


def total_bytes(folder: Path) -> int:
    """Size of all files below `folder`, links not counted."""
    return sum(_size_bytes(path) for path in _files(folder) if not path.is_symlink())


def _files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):  # passes over folders that are gone, which `rglob` doesn't
        yield from (Path(where, name) for name in names)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # deleted since it was listed, or a link to nothing
        return 0
