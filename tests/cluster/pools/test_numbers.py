"""Which clusters' KV has the same names."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import Override, load
from cluster.pools.members import first_members
from cluster.pools.numbers import kv_numbers, weight_format
from diptych.hashing import KvIdentity
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


def test_no_prefix_of_one_cache_passes_for_one_in_other_numbers() -> None:
    told = [{}, {"kv__dtype": "fp8"}, {"model__dtype": "fp32"}, {"kv__wire": "int8"}, {"kv__wire": "fp8_e4m3"}]
    names = [kv_numbers(config(**values)) for values in told]
    assert names == ["bf16", "fp8", "fp32", "bf16 over int8", "bf16 over fp8_e4m3"]
    # fp8 of a model in fp32 is not fp8 of one in bf16.
    both = [{"kv__dtype": "fp8"}, {"kv__dtype": "fp8", "model__dtype": "fp32"}]
    forms = [(named(**values), kv_numbers(config(**values))) for values in both]
    roots = [KvIdentity(model_digest="m", weight_format=form, kv_dtype=kv).root() for form, kv in forms]
    roots += [KvIdentity(model_digest="m", weight_format="bf16", kv_dtype=name).root() for name in names]
    assert roots[0] == roots[3]
    assert len(set(roots)) == len(roots) - 1


def test_each_pools_workers_are_told_theirs() -> None:
    members = first_members(config(pools__decode__weights="int4", pools__prefill__activations="int8"), site())
    told: list[tuple[WeightFormat, Activations]] = [(each.weights, each.activations) for each in members]
    assert told == [("auto", "int8"), ("int4", "bf16")]
