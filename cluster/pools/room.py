"""Waiting until Ray has room for an actor, and saying what it lacks. Decides no size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, cast

import ray

from cluster.pools.nodes import living_nodes
from diptych.errors import ServingError
from workers.actors import answer

QUIET_SECONDS: Final = 15.0
"""A process starts faster than this, on a busy machine too."""
_NODE_ID: Final = "ray.io/node-id"
"""A label that Ray gives every node."""


class NoRoom(ServingError):
    """Ray had no room for a process in time; the message says what was missing."""


class Room(NamedTuple):
    """What a process asks of its node."""

    needs: Mapping[str, float]
    """By the names of Ray's options."""
    labels: Mapping[str, str]
    avoided: frozenset[str] = frozenset()
    """Ray's ids of nodes that it must not be on."""

    @property
    def named_needs(self) -> dict[str, float]:
        """By Ray's names of resources instead of its options' names."""
        return {name.removeprefix("num_").upper()[:3]: amount for name, amount in self.needs.items() if amount}

    @property
    def selector(self) -> dict[str, str]:
        """For `label_selector`."""
        away = {_NODE_ID: f"!in({','.join(sorted(self.avoided))})"} if self.avoided else {}
        return {**self.labels, **away}


async def wait_room(
    handle: Any,  # noqa: ANN401 (handles are untyped)
    who: str,
    room: Room,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Until the process runs. Raises NoRoom after `seconds`."""
    if too_large := await asyncio.to_thread(_too_large, room):
        say(f"{who} waits for a node to be added: {too_large}")
    ready = asyncio.ensure_future(answer(handle.__ray_ready__.remote(), who))
    try:
        await asyncio.wait({ready}, timeout=min(QUIET_SECONDS, seconds))
        if not ready.done() and not too_large:
            say(f"{who} waits for room: {await asyncio.to_thread(_state, room)}")
        await asyncio.wait_for(ready, max(0.0, seconds - QUIET_SECONDS))
    except TimeoutError:
        why = await asyncio.to_thread(lambda: _too_large(room) or _state(room))
        raise NoRoom(
            f"Ray had no room for {who} within {seconds:g} s: {why}. Add nodes, start "
            "fewer workers, set engine.threads lower, or raise cluster.room_seconds for an autoscaler"
        ) from None


def _too_large(room: Room) -> str:
    """Why no node of this Ray could have it, however idle."""
    wanted = room.named_needs
    nodes = [node for node in living_nodes() if node.has(room.labels) and node.id not in room.avoided]
    if not nodes:
        labelled = f"no node is labelled {_told(room.labels)} (`ray start --labels`)" if room.labels else "no node"
        return labelled + (" that is to stay" if room.avoided else "")
    if any(node.fits(wanted) for node in nodes):
        return ""
    largest = {name: max(node.resources.get(name, 0.0) for node in nodes) for name in wanted}
    labelled = f" labelled {_told(room.labels)}" if room.labels else ""
    return f"it needs {_amounts(wanted)} on one node{labelled}, the most that one has is {_amounts(largest)}"


def _told(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _state(room: Room) -> str:
    wanted = room.named_needs
    free = cast("Mapping[str, float]", ray.available_resources())  # pyright: ignore
    total = cast("Mapping[str, float]", ray.cluster_resources())  # pyright: ignore
    if not wanted:
        return "its process has not started"
    return (
        f"it needs {_amounts(wanted)}, free are {_amounts({name: free.get(name, 0.0) for name in wanted})} "
        f"of {_amounts({name: total.get(name, 0.0) for name in wanted})} in all"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
