"""What an operator calls a node, and what a worker asks of one."""

from __future__ import annotations

import pytest

from cluster.pools.nodes import Node, find_node
from cluster.pools.room import Room
from diptych.errors import InvalidRequest


def node(name: str, address: str, **resources: float) -> Node:
    return Node(id=name, address=address, labels={"role": "decode"}, resources=resources)


NODES = [node("aa", "10.0.0.1"), node("bb", "10.0.0.2"), node("cc", "127.0.0.1"), node("dd", "127.0.0.1")]


def test_a_node_is_found_by_its_address_and_by_its_id() -> None:
    assert find_node("10.0.0.2", NODES).id == "bb"
    assert find_node("aa", NODES).address == "10.0.0.1"


def test_several_at_one_address_have_to_be_told_apart() -> None:
    with pytest.raises(InvalidRequest, match=r"2 nodes are at 127\.0\.0\.1: say which by its id, cc, dd"):
        find_node("127.0.0.1", NODES)
    assert find_node("dd", NODES).id == "dd"


@pytest.mark.parametrize("name", ["10.0.0.9", "", "10.0.0", "a", "!in(aa)", "10.0.0.1 "])
def test_a_stranger_is_not_known(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"but 10\.0\.0\.1, 10\.0\.0\.2, 127\.0\.0\.1"):
        find_node(name, NODES)


def test_a_node_fits_what_all_of_it_has() -> None:
    roomy = node("aa", "10.0.0.1", CPU=4.0, GPU=1.0)
    assert roomy.fits({"CPU": 4.0, "GPU": 0.5})
    assert not roomy.fits({"CPU": 4.5})
    assert not roomy.fits({"TPU": 1.0})


def test_a_worker_asks_for_labels_and_for_none_of_the_nodes_that_go() -> None:
    asked = Room({"num_cpus": 2.0, "num_gpus": 0.0}, {"role": "decode"}, frozenset({"bb", "aa"}))
    assert asked.selector == {"role": "decode", "ray.io/node-id": "!in(aa,bb)"}
    assert asked.named_needs == {"CPU": 2.0}
    assert Room({}, {"role": "decode"}).selector == {"role": "decode"}
