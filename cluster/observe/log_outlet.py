"""Takes what a process logs to whoever reads it, a few lines at a time. Knows `logging`, not who reads."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

from cluster.journal import FIELDS, Entry, Level

_GATHER_SECONDS: Final = 0.05
"""Each batch is a message between processes: they cost more than the lines in them."""
_KEPT_LINES: Final = 10_000
_OURS: Final = "cluster"
_LEVELS: Final[dict[int, Level]] = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "error",
    logging.CRITICAL: "error",
}


class LogOutlet(logging.Handler):
    """Of one process; lives on one event loop, and is written to from any thread."""

    def __init__(self, source: str, *, quotes: bool = False) -> None:
        """`quotes`: an exception's own words, which may be a request's, stand in the log."""
        super().__init__()
        self._source = source
        self._quotes = quotes
        self._loop = asyncio.get_running_loop()
        self._lines: deque[Entry] = deque(maxlen=_KEPT_LINES)
        self._wake = asyncio.Event()
        self._ended = False

    def install(self, level: Level) -> None:
        """All of this process's logging comes here: ours from `level` on, other libraries' from warning on."""
        logging.getLogger().addHandler(self)
        logging.getLogger(_OURS).setLevel(level.upper())
        # Ray's own lines are for Ray's own files.
        self.addFilter(lambda record: not record.name.startswith("ray"))

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, object] = dict(getattr(record, FIELDS, {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = self._trace(record.exc_info[1])
        level = _LEVELS.get(record.levelno, "info")
        self._lines.append(Entry(record.created, level, self._source, record.getMessage().strip(), fields))
        if not self._wake.is_set():
            self._loop.call_soon_threadsafe(self._wake.set)

    def end(self) -> None:
        """`batches` ends after what is here now."""
        self._ended = True
        self._wake.set()

    async def batches(self) -> AsyncGenerator[tuple[Entry, ...]]:
        """What was logged, soon after."""
        while True:
            await self._wake.wait()
            if not self._ended:
                await asyncio.sleep(_GATHER_SECONDS)
            self._wake.clear()
            lines = tuple(self._lines)
            self._lines.clear()
            if lines:
                yield lines
            if self._ended:
                return

    def _trace(self, error: BaseException) -> str:
        told = traceback.TracebackException.from_exception(error)
        if self._quotes:
            return "".join(told.format())
        return "".join([*told.stack.format(), type(error).__name__])
