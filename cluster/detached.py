"""Detached clusters of a Ray, from outside: start one, find one by name, stop one. The owner does the work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

from cluster.config import Config
from cluster.pools.members import Site
from cluster.pools.owner import Lease, OwnerActor
from cluster.pools.processes import actor_options, here
from cluster.ray_session import NAMESPACE
from diptych.errors import ServingError, WorkerLost
from workers.actors import answer

if TYPE_CHECKING:
    from cluster.front.actor import Ports
    from diptych.types import ClusterStatus

_ANSWER_SECONDS = 15.0
_STOP_SECONDS = 20.0
"""Beside what the owner needs: Ray's own part of it."""


class NoSuchCluster(ServingError):
    """No detached cluster of that name; the message names those there are."""


class NameTaken(ServingError):
    """A detached cluster of that name runs already."""


def check_absent(name: str) -> None:
    """Raises NameTaken."""
    if name in names():
        raise NameTaken(
            f"a cluster named {name} runs on this Ray already: `diptych stop --name {name}`, or give this one another "
            "name with --set cluster.name=NAME (and other ports)"
        )


def names() -> list[str]:
    """All detached clusters of this Ray."""
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)  # pyright: ignore
    return sorted(actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)


async def start(config: Config, site: Site, say: Callable[[str], None]) -> tuple[Ports, ...]:
    """Returns when it is up; a failure or a cancellation on the way ends what was started of it."""
    name = config.cluster.name
    options = actor_options() | here(site.node) | {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
    try:
        owner: Any = ray.remote(**options)(OwnerActor).remote(config, site)  # pyright: ignore
    except ValueError as error:  # another launcher was faster
        raise NameTaken(f"a cluster named {name} starts on this Ray already") from error
    try:
        async for item in owner.start.remote():
            news = await answer(item, f"the owner of {name}")
            if not isinstance(news, str):
                return news
            say(news)
        raise AssertionError("the owner ends with ports or an error")
    except BaseException:
        ray.kill(owner)  # pyright: ignore[reportUnknownMemberType]
        raise


async def describe(name: str) -> Lease:
    """Raises NoSuchCluster, or WorkerLost when it doesn't answer."""
    return await _bounded(_owner(name).describe.remote(), name, _ANSWER_SECONDS)


async def status(name: str) -> ClusterStatus:
    """Its scheduler's view. Raises like `describe`."""
    return await _bounded(_owner(name).status.remote(), name, _ANSWER_SECONDS)


async def stop(name: str) -> None:
    """Returns when nothing of it is left. Raises NoSuchCluster."""
    owner = _owner(name)
    dead = owner.wait_dead.remote()
    with suppress(WorkerLost):  # its process ends with the call, or is stuck
        lease = await describe(name)
        await _bounded(owner.stop.remote(), name, lease.stop_seconds + _STOP_SECONDS)
    ray.kill(owner)  # pyright: ignore[reportUnknownMemberType]
    with suppress(WorkerLost):
        await _bounded(dead, name, _ANSWER_SECONDS)


async def _bounded(call: Any, name: str, seconds: float) -> Any:  # noqa: ANN401
    try:
        return await asyncio.wait_for(answer(call, f"the cluster {name}"), seconds)
    except TimeoutError:
        raise WorkerLost(f"the cluster {name} did not answer for {seconds:g} s") from None


def _owner(name: str) -> Any:  # noqa: ANN401
    try:
        return ray.get_actor(name, NAMESPACE)  # pyright: ignore
    except ValueError as error:
        there = ", ".join(names()) or "none"
        raise NoSuchCluster(f"this Ray has no detached cluster named {name}; it has {there}") from error
