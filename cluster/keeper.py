"""Nothing outlives the launcher: two processes that each clean up if the other is killed.

The keeper (the process that the user sees) forks the launcher and waits.

    keeper killed    the kernel sends the launcher SIGTERM: it stops in order
    launcher killed  what it started is handed to the keeper by the kernel, which kills it

Ray alone doesn't: after `kill -9` of a driver, agents of its raylet were seen alive a minute later.
On systems other than Linux the launcher simply runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ENDED_SECONDS = 5.0
"""How long killed orphans may take to disappear."""


def keep(run: Callable[[], int]) -> int:
    """The exit status of `run`, in a process of its own; afterwards no process that it left is alive.

    Call it before any thread is started: it forks.
    """
    if not sys.platform.startswith("linux"):
        return run()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()
    launcher = os.fork()
    if launcher == 0:
        # A signal to the whole group (Ctrl-C, timeout) must not end Ray before the cluster has stopped.
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != keeper:  # it died before the line above
            os._exit(1)
        _exit_with(run)

    def forward(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(launcher, number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    status = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    _end_orphans()
    return status if status >= 0 else 128 - status


def _exit_with(run: Callable[[], int]) -> None:
    """Ends this process as a Python program ends, without going back to the keeper's callers."""
    status = 1
    try:
        status = run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # nobody above says it: this process ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_orphans() -> None:
    """Kill what the launcher left, children of children too: their orphans come to us in turn."""
    deadline = time.monotonic() + _ENDED_SECONDS
    while (children := _children()) and time.monotonic() < deadline:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _children() -> list[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in listed.split()]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
