"""Pools that take what nodes offer: a worker more where one fits, none in place of one that they can do without.

`pools.*.workers` are asked of Ray, and waited for; what is beyond them, up to `max_workers`, only ever takes room that
is there. So an autoscaler of Ray adds nodes for the former, and whoever adds nodes gets the latter.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.pools.members import free_numbers
from cluster.pools.nodes import Node, living_nodes
from cluster.pools.watch import Deaths
from diptych.types import Role

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.pools.changes import House
    from cluster.pools.parts import WorkerPart

_log = logging.getLogger(__name__)
_LOOK_SECONDS: Final = 2.0
_AGAIN_SECONDS: Final = 60.0
"""A node whose room somebody else has is left alone for so long."""


class Growing(NamedTuple):
    """A pool that may have more workers than it has."""

    role: Role
    have: int
    least: int
    needs: Mapping[str, float]
    """Of each worker, by Ray's names."""
    labels: Mapping[str, str]
    """That its nodes have."""


def next_worker(
    pools: Sequence[Growing], nodes: Sequence[Node], used: Mapping[str, Mapping[str, float]]
) -> tuple[Role, Node] | None:
    """Whom to start, and where: the pool that has grown least by its size, on the emptiest node that fits.

    `used` is by node, what our workers have of it.
    """
    for pool in sorted(pools, key=lambda pool: pool.have / max(1, pool.least)):
        fitting = [node for node in nodes if node.has(pool.labels) and _fits(node, used.get(node.id, {}), pool.needs)]
        if fitting:
            return pool.role, min(fitting, key=lambda node: sum(used.get(node.id, {}).values()))
    return None


def _fits(node: Node, used: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return node.fits({name: amount + used.get(name, 0.0) for name, amount in needs.items()})


class Growth:
    """Of one cluster. Lives on its pools' event loop."""

    def __init__(self, config: Config, house: House, *, joined: bool) -> None:
        """In a Ray of our own nothing grows: it is one machine, whose cores are shared out."""
        self._config = config
        self._house = house
        self._growing = set(config.pools.growing if joined else ())
        self._deaths: dict[str, Deaths] = {}
        self._full: dict[str, float] = {}
        """Nodes, and until when nothing is tried there."""

    def hold(self, role: Role) -> None:
        """Somebody said how many there are to be: from now on that holds."""
        self._growing.discard(role)

    def needs(self, part: WorkerPart) -> bool:
        """Whether its pool has to have another for it, wherever there is room."""
        role = part.spec.role
        if part.leaving:
            return self.is_short(role)  # or its successor is there, or on its way
        return role not in self._growing or self.staying(role, part) < self._config.pools.of(role).workers

    def is_short(self, role: Role) -> bool:
        """Whether fewer stay, or are on their way, than there have to be."""
        return self.staying(role) < self._config.pools.of(role).workers

    def staying(self, role: Role, but: WorkerPart | None = None) -> int:
        """Workers of the role that are there or on their way, without those whose node is to go."""
        parts = self._house.workers.values()
        return sum(part.spec.role == role and part is not but and not (part.leaving or part.lost) for part in parts)

    def died(self, node: str) -> None:
        """A worker there, which its pool could do without."""
        self._deaths.setdefault(node, Deaths(self._config.cluster.max_deaths)).add(time.monotonic())

    def refused(self, node: str) -> None:
        """Somebody else has the room there."""
        self._full[node] = time.monotonic() + _AGAIN_SECONDS

    async def run(self) -> None:
        """As long as it is left running."""
        while self._growing:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                nodes = await asyncio.to_thread(living_nodes)
                if not self._somebody_waits():
                    self._look(nodes)
            except Exception:
                _log.exception("no pool grew; it is tried again")

    def _somebody_waits(self) -> bool:
        """Room is first for those whom a pool can't do without, and for who is replaced just now."""
        return self._house.changing or any(
            not (part.info or part.lost or part.node) for part in self._house.workers.values()
        )

    def _look(self, nodes: Sequence[Node]) -> None:
        alive = {node.id for node in nodes}
        self._deaths = {node: deaths for node, deaths in self._deaths.items() if node in alive}
        self._full = {node: until for node, until in self._full.items() if until > time.monotonic()}
        welcome = [node for node in nodes if self._is_welcome(node.id)]
        if chosen := next_worker([*filter(None, map(self._pool, sorted(self._growing)))], welcome, self._used()):
            role, node = chosen
            [number] = free_numbers(role, self._house.names, 1)
            self._house.bring(self._house.part(role, number, node.id))

    def _is_welcome(self, node: str) -> bool:
        deaths = self._deaths.get(node)
        return node not in self._house.avoided and node not in self._full and not (deaths and deaths.too_many)

    def _pool(self, role: Role) -> Growing | None:
        pool, have = self._config.pools.of(role), self.staying(role)
        if have >= pool.max_workers:
            return None
        room = self._house.room(role)
        return Growing(role, have, pool.workers, room.named_needs, room.labels)

    def _used(self) -> dict[str, Counter[str]]:
        used: dict[str, Counter[str]] = {}
        for part in self._house.workers.values():
            used.setdefault(part.where, Counter()).update(self._house.room(part.spec.role).named_needs)
        return used
