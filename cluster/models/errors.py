"""Why a model can't be had.

* UnknownModel            nothing here or elsewhere goes by that name
  x ModelUnreachable      the name is fine, fetching it failed: the message says how to go on
  x UnsupportedModel      the files are here, and can't be read or served
"""

from __future__ import annotations

from diptych.errors import UnknownModel


class ModelUnreachable(UnknownModel):
    """The model exists but couldn't be fetched now."""


class UnsupportedModel(UnknownModel):
    """The model's files are damaged, or of a kind that diptych doesn't read."""
