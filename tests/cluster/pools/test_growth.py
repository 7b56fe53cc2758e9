"""Who is started where when nodes have room, and when the last worker of a kind may not go."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import Config, ConfigError, Override, load
from cluster.pools.growth import Growing, next_worker
from cluster.pools.nodes import Node
from cluster.pools.served import unserved
from diptych.types import Role


def node(name: str, role: str, cpus: float) -> Node:
    return Node(id=name, address=name, labels={"role": role}, resources={"CPU": cpus})


def growing(role: Role, have: int, least: int = 1, labels: dict[str, str] | None = None) -> Growing:
    return Growing(role, have, least, {"CPU": 2.0}, {"role": role} if labels is None else labels)


def config(**values: Any) -> Config:
    return load(None, {}, [Override(name.replace("__", "."), value, "--set") for name, value in values.items()])


def test_a_worker_goes_where_its_labels_and_its_cpus_are() -> None:
    nodes = [node("a", "prefill", 8.0), node("b", "decode", 1.0), node("c", "decode", 2.0)]
    assert next_worker([growing("decode", 1)], nodes, {}) == ("decode", nodes[2])
    assert next_worker([growing("mixed", 1)], nodes, {}) is None


def test_what_our_workers_have_of_a_node_is_not_there_any_more() -> None:
    nodes = [node("a", "decode", 3.0), node("b", "decode", 3.0)]
    assert next_worker([growing("decode", 1)], nodes, {"a": {"CPU": 2.0}}) == ("decode", nodes[1])
    assert next_worker([growing("decode", 1)], nodes, {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}) is None


def test_pools_that_share_nodes_grow_in_proportion() -> None:
    nodes, have = [node("a", "any", 100.0)], {"prefill": 1, "decode": 2}
    for _ in range(9):
        pools = [growing("prefill", have["prefill"], 1, {}), growing("decode", have["decode"], 2, {})]
        chosen = next_worker(pools, nodes, {})
        assert chosen
        have[chosen[0]] += 1
    assert have == {"prefill": 4, "decode": 8}


def test_nobody_is_started_where_there_are_no_nodes_or_no_pools() -> None:
    assert next_worker([growing("decode", 1)], [], {}) is None
    assert next_worker([], [node("a", "decode", 8.0)], {}) is None


def test_a_pool_that_may_have_fewer_than_it_begins_with_is_refused() -> None:
    assert config(pools__decode__workers=2, pools__decode__max_workers=2).pools.decode.max_workers == 2
    with pytest.raises(ConfigError, match="max_workers = 1 is below workers = 2: raise it, or leave it 0"):
        config(pools__decode__workers=2, pools__decode__max_workers=1)


def test_two_can_not_both_say_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=r"autoscale.enabled and pools.decode.max_workers both say"):
        config(pools__decode__max_workers=3, autoscale__enabled=True)


@pytest.mark.parametrize(
    ("how", "roles", "lacks"),
    [
        ("auto", ["prefill", "decode"], ""),
        ("auto", ["mixed"], ""),
        ("auto", ["decode"], ""),
        ("auto", ["prefill", "prefill"], "nobody would decode"),
        ("auto", [], "nobody would decode"),
        ("remote", ["decode", "mixed"], "would lack a prefill or a decode worker"),
        ("remote", ["prefill", "decode"], ""),
    ],
)
def test_some_can_not_be_done_without(how: str, roles: list[Role], lacks: str) -> None:
    told = unserved(config(placement__how=how), roles)
    assert lacks in told
    assert bool(lacks) == bool(told)
