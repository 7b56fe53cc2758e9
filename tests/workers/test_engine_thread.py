"""The thread that steps an engine, alone."""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest

from workers.engine_thread import EngineThread

if TYPE_CHECKING:
    from workers.engine_thread import Roles


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.parametrize(("nice", "more"), [(0, 0), (2, 2), (100, 100)])
def test_its_niceness_is_its_own_and_its_teams(nice: int, more: int) -> None:
    before, found = own_niceness(), SimpleQueue[Any]()

    def build() -> Any:
        found.put(own_niceness())
        team = threading.Thread(target=lambda: found.put(own_niceness()))
        team.start()
        team.join()
        raise RuntimeError("that is all")

    def ready(made: Roles | BaseException) -> None:
        found.put(made)

    EngineThread("w", 1, nice).start(build, ready)
    told = [found.get(timeout=60) for _ in range(3)]
    assert told[:2] == [min(19, before + more)] * 2
    assert "that is all" in str(told[2])
    assert own_niceness() == before
