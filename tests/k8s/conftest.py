"""Needs the `k8s` extra: without it these tests skip, and say so."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = find_spec("kubernetes_validate") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.k8s)
            if missing:
                item.add_marker(pytest.mark.skip(reason="the k8s extra is not installed: `make k8s-check` installs it"))
