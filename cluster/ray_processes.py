"""Which processes a Ray of our own runs beside our actors. Knows Ray's insides, not what Ray is for.

Each of Ray's helpers is a Python of 50 to 100 MB that wakes many times a second: together they took a
sixth of an idle cluster's CPU. `ray start` has options that leave two of them out; `ray.init` has none.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Generator

_UNUSED: Final = {
    "start_log_monitor": "reads every process's files ten times a second, to print them at the driver",
    "start_monitor": "the autoscaler: our Ray is this machine",
    "start_api_server": "the dashboard's head, without the dashboard: job submission, and lists of actors",
}
"""Methods of `ray._private.node.Node`, and what the process that each starts is for."""


@contextmanager
def fewer_processes() -> Generator[None]:
    """A Ray that is started inside runs what our actors need. One that knows no such method starts it all."""
    from ray._private.node import Node

    with ExitStack() as patches:
        for name in _UNUSED:
            if hasattr(Node, name):
                patches.enter_context(patch.object(Node, name, _skip))
        yield


def _skip(*_: object, **__: object) -> None:
    """Nothing is started."""
