"""The contract of a diptych cluster: types, errors, block names, and the thin Python client."""

from diptych.errors import ServingError

__all__ = ["ServingError", "__version__"]

__version__ = "0.1.0"
