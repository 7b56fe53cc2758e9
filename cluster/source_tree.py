"""Where our code lies when it runs from a source tree. Knows paths, not Ray.

Not called `proto`: proto-plus, which ray[default] brings, owns that import name. So `proto/` is a
source root of its own, which an installation maps away and a bare tree has to put on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

_TREE = Path(__file__).resolve().parent.parent


def source_roots() -> tuple[str, ...]:
    """Folders that another process needs on PYTHONPATH to import what this one runs.

    Empty when diptych is installed from a wheel: every interpreter of the installation finds it.
    """
    proto = _TREE / "proto"
    if not (proto / "diptych" / "__init__.py").is_file():
        return ()
    return (str(_TREE), str(proto))


def enter_source_tree() -> None:
    """Lets this process import `diptych` from the tree, before any other version of it."""
    missing = [root for root in source_roots() if root not in sys.path]
    sys.path[:0] = missing
