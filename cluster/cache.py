"""The folder where diptych keeps what it fetched. Knows nothing of models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$DIPTYCH_CACHE, else $XDG_CACHE_HOME/diptych, else ~/.cache/diptych. It may not exist yet."""
    own = os.environ.get("DIPTYCH_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is invalid and is to be ignored.
    if shared and Path(shared).is_absolute():
        return Path(shared) / "diptych"
    return Path.home() / ".cache" / "diptych"
