"""Which clusters' KV has the same names."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import Override, load
from cluster.pools.members import first_members
from cluster.pools.numbers import weight_format
from diptych.types import Activations, WeightFormat
from tests.cluster.pools.test_members import site


def named(**values: Any) -> str:
    return weight_format(config(**values))


def config(**values: Any) -> Any:
    return load(None, {}, [Override(name.replace("__", "."), value, "--set") for name, value in values.items()])


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "bf16"),
        ({"engine__weights": "bf16"}, "bf16"),
        ({"engine__weights": "int4"}, "bf16 from int4"),
        ({"pools__prefill__weights": "bf16", "pools__decode__weights": "auto"}, "bf16"),
        ({"engine__activations": "int8"}, "bf16, activations int8"),
        ({"engine__weights": "bf16", "engine__activations": "auto"}, "bf16"),
        (
            {"engine__weights": "int8", "pools__decode__weights": "int4", "pools__prefill__activations": "int8"},
            "prefill bf16 from int8, activations int8; decode bf16 from int4; mixed bf16 from int8",
        ),
        ({"model__dtype": "fp32", "engine__weights": "int4", "pools__prefill__activations": "int8"}, "fp32"),
    ],
    ids=str,
)
def test_a_name_tells_all_that_was_rounded_and_nothing_else(values: dict[str, Any], name: str) -> None:
    assert named(**values) == name


def test_each_pools_workers_are_told_theirs() -> None:
    members = first_members(config(pools__decode__weights="int4", pools__prefill__activations="int8"), site())
    told: list[tuple[WeightFormat, Activations]] = [(each.weights, each.activations) for each in members]
    assert told == [("auto", "int8"), ("int4", "bf16")]
