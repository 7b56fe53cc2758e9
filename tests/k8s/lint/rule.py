"""What a rule is. Knows none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from tests.k8s.manifests import Doc

Rule: TypeAlias = Callable[[list[Doc]], Iterator[str]]
"""Problems of rendered manifests, a line each. Its name is what must hold."""
