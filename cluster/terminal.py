"""stderr, for a person or a file: lines, and bars where there is a terminal. Knows no meaning of either."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final, TextIO

from cluster.models.progress import EVERY_SECONDS, Step

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress

_BAR_CELLS: Final = 24


class Terminal:
    """Use it in a `with`, which takes the last bar away."""

    def __init__(self, stream: TextIO | None = None, *, bars: bool = True) -> None:
        """`bars`: drawn when the stream is a terminal; otherwise, and elsewhere, steps are lines too."""
        self._stream = stream or sys.stderr
        self._bars = bars and self._stream.isatty()
        self._drawn: Progress | None = None
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end_bar()

    def tell(self, line: str, shown: str | None = None) -> None:
        """`shown` is the line as it stands in a log. Steps without a bar are told every two seconds at most."""
        if isinstance(line, Step):
            if self._bars:
                return self._draw(line)
            if time.monotonic() - self._told < EVERY_SECONDS:
                return None
        self.end_bar()
        self._told = time.monotonic()
        self._stream.write(f"{line if shown is None else shown}\n")
        self._stream.flush()
        return None

    def end_bar(self) -> None:
        """Takes it away; harmless without one."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None

    def _draw(self, step: Step) -> None:
        if self._drawn is None:
            self._drawn = _bar(self._stream)
            self._drawn.start()
            self._drawn.add_task(step, total=None)
        [task] = self._drawn.task_ids
        self._drawn.update(task, description=str(step), completed=step.part, total=step.whole or None)


def _bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(_BAR_CELLS), TimeElapsedColumn())
    return Progress(*columns, console=Console(file=stream), transient=True)
