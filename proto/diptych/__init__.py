"""The contract of a diptych cluster: types, errors, block names, and the thin Python client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diptych.errors import ServingError

if TYPE_CHECKING:
    from diptych.async_client import AsyncClient
    from diptych.client import Client

__all__ = ["AsyncClient", "Client", "ServingError", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The clients load gRPC, which every worker that imports a type would otherwise pay for."""
    if name == "AsyncClient":
        from diptych.async_client import AsyncClient

        return AsyncClient
    if name == "Client":
        from diptych.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
