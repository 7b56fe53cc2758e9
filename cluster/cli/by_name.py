"""Commands on a detached cluster, found by its name through the Ray it runs on. Knows no command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cluster.ray_address import RayUnusable, ray_address

if TYPE_CHECKING:
    from diptych.v1.admin_pb2 import GetStatusResponse

T = TypeVar("T")

takes_name = click.option("--name", metavar="NAME", help="A detached cluster, through the Ray at RAY_ADDRESS.")


def status_of_name(name: str) -> GetStatusResponse:
    """As its fronts would say it. Raises ServingError."""

    async def ask() -> GetStatusResponse:
        from cluster.detached import status
        from cluster.front.grpc_messages import status_of

        told = await status(name)
        ready = any(worker.alive and worker.info.role != "prefill" for worker in told.workers)
        return status_of(told, ready=ready)

    return _on_its_ray(ask)


def stop_by_name(name: str) -> None:
    """Returns when nothing of it is left. Raises ServingError."""

    async def ask() -> None:
        from cluster.detached import stop

        await stop(name)

    _on_its_ray(ask)


def _on_its_ray(ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    address = ray_address()
    if address is None:
        raise RayUnusable("a name is looked up in the Ray that the cluster runs on: set RAY_ADDRESS to its HOST:PORT")
    from cluster.ray_session import open_ray

    session = open_ray(address)
    try:
        return asyncio.run(ask())
    finally:
        session.close()
