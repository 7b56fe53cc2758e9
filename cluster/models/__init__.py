"""From what the user calls a model to files on this machine. Knows files and registries, not tokens or tensors."""

from cluster.models.errors import ModelUnreachable, UnsupportedModel
from cluster.models.naming import DEFAULT_MODEL, resolve

__all__ = ["DEFAULT_MODEL", "ModelUnreachable", "UnsupportedModel", "resolve"]
