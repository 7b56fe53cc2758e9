"""Which build of diptych a process runs. One cluster is one build: joining compares it."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from diptych import __version__

_PACKAGES = ("cluster", "diptych", "kernels", "workers")


def build_identity() -> str:
    """`<version>+<12 hex digits>` over our packages' sources, as this process would import them."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
