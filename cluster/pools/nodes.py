"""The nodes of a Ray: which are alive, what they offer, and what an operator calls them. Knows no worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import ray

from diptych.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One `ray start`. Started again, it is another node."""

    id: str
    address: str
    labels: Mapping[str, str]
    resources: Mapping[str, float]
    """All that it has, free or not, by Ray's names."""

    def has(self, labels: Mapping[str, str]) -> bool:
        """All of these."""
        return labels.items() <= self.labels.items()

    def fits(self, needs: Mapping[str, float]) -> bool:
        """On all of it."""
        return all(self.resources.get(name, 0.0) >= amount for name, amount in needs.items())


def living_nodes() -> list[Node]:
    """Asks Ray: milliseconds, or as long as its head is away."""
    told = cast("list[dict[str, Any]]", ray.nodes())  # pyright: ignore
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            labels=dict(node.get("Labels") or {}),
            resources=node["Resources"],
        )
        for node in told
        if node["Alive"]
    ]


def find_node(name: str, nodes: Iterable[Node]) -> Node:
    """By its address or its id. Raises InvalidRequest."""
    known = {node.id: node for node in nodes}
    found = [node for node in known.values() if name in (node.id, node.address)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(node.id for node in found)
        raise InvalidRequest(f"{len(found)} nodes are at {name}: say which by its id, {ids}", param="node")
    there = ", ".join(sorted({node.address for node in known.values()}))
    raise InvalidRequest(f"no node {name!r} in this Ray, but {there}", param="node")
