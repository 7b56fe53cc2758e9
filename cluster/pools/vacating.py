"""A node of Ray that is to go: its pools get workers elsewhere, and what could be missed least drains first.

What asks is mostly a pod that ends (its preStop): it waits for `cluster.drain_seconds` and no longer. So the workers
that nobody could do without are held for most of that time, until somebody else serves; then all drain.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from cluster.pools.members import free_numbers
from cluster.pools.nodes import Node, find_node, living_nodes
from cluster.pools.served import unserved
from diptych.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from cluster.config import Config
    from cluster.pools.changes import House
    from cluster.pools.growth import Growth
    from cluster.pools.parts import WorkerPart

_STAND_IN_SHARE: Final = 0.75
"""Of the drain's bound: answers move within a second, a pod's successor takes its image and its weights."""


class Vacating:
    """Of one cluster. Lives on its pools' event loop."""

    def __init__(self, config: Config, house: House, growth: Growth) -> None:
        self._config = config
        self._house = house
        self._growth = growth
        self._heirs: dict[WorkerPart, WorkerPart] = {}
        """Who was brought for whom."""
        self._under_way: Counter[str] = Counter()
        """Drains, by node: a pod's end and an operator may ask for the same."""

    @asynccontextmanager
    async def node(self, name: str) -> AsyncGenerator[Node]:
        """Entered when its workers can go, or waiting longer would leave no time to drain. Nothing starts there from
        now on; where the drain raises, it is as before. Raises InvalidRequest.
        """
        nodes = await asyncio.to_thread(living_nodes)
        node = find_node(name, nodes)
        if len(nodes) == 1:
            raise InvalidRequest(f"{name} is the only node of this Ray: add another first", param="node")
        self._under_way[node.id] += 1
        self._house.avoid(node.id, [each.id for each in nodes])
        try:
            await self._prepare(node)
            yield node
        except BaseException:
            if self._under_way[node.id] == 1:
                self._restore(node)
            raise
        finally:
            self._under_way = self._under_way - Counter([node.id])
            there = set(self._house.workers.values())
            self._heirs = {part: heir for part, heir in self._heirs.items() if part in there}

    async def _prepare(self, node: Node) -> None:
        self._succeed(node)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STAND_IN_SHARE * self._config.cluster.drain_seconds):
                while self.lacking_without(self.workers_on(node)):
                    await self._house.arrival()
        self._succeed(node)  # one that was starting may have come up there

    def _restore(self, node: Node) -> None:
        """Who waits for room in vain is not wanted any more; who loads already comes, and then the node can go."""
        for part in self.workers_on(node):
            heir = self._heirs.pop(part, None)
            if heir and (heir.info or heir.placed) and not heir.lost:
                continue
            part.leaving = False
            if heir and not heir.lost:
                self._house.dismiss(heir)
        self._house.welcome(node.id)

    def workers_on(self, node: Node) -> list[WorkerPart]:
        """That are up, and don't drain yet."""
        return [part for part in self._up() if part.where == node.id]

    def leaving(self, node: Node) -> tuple[list[WorkerPart], list[WorkerPart]]:
        """Who can go from it now, and who has to stay until its end."""
        going: list[WorkerPart] = []
        staying: list[WorkerPart] = []
        for part in sorted(self.workers_on(node), key=lambda part: part.spec.role != "prefill"):
            (staying if self.lacking_without([*going, part]) else going).append(part)
        return going, staying

    def lacking_without(self, parts: Iterable[WorkerPart]) -> str:
        """Why requests that are answered now would not be without them; empty when they are not needed for it."""
        without, up = set(map(id, parts)), self._up()
        if unserved(self._config, [part.spec.role for part in up]):
            return ""
        return unserved(self._config, [part.spec.role for part in up if id(part) not in without])

    def _up(self) -> list[WorkerPart]:
        return [part for part in self._house.workers.values() if part.info and not part.retiring]

    def _succeed(self, node: Node) -> None:
        """For each worker there, where its pool is too small without it: again when a successor was given up."""
        for part in self.workers_on(node):
            needed, role = self._growth.needs(part), part.spec.role
            part.leaving = True
            if needed:
                [number] = free_numbers(role, self._house.names, 1)
                heir = self._heirs[part] = self._house.part(role, number)
                self._house.bring(heir)
