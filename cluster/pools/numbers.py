"""In which numbers a cluster's workers compute, as the names of its KV blocks tell it. Knows no worker."""

from __future__ import annotations

from cluster.config import Config
from diptych.types import Role

_ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")


def weight_format(config: Config) -> str:
    """`KvIdentity.weight_format`: other clusters take no KV of this one unless theirs says the same.

    Within a cluster the pools' KV has one name, whatever each computes with: they were set so to
    work for one another.
    """
    dtype = config.model.served_dtype
    if dtype == "fp32":  # nothing is rounded, whatever else is set
        return dtype
    rounded = {role: _rounded(config, role) for role in _ROLES}
    if len(set(rounded.values())) == 1:
        return dtype + rounded["mixed"]
    return "; ".join(f"{role} {dtype}{how}" for role, how in rounded.items())


def kv_numbers(config: Config) -> str:
    """`KvIdentity.kv_dtype`: what a quantised wire rounded must never pass for what was computed."""
    dtype, wire = config.kv_dtype, config.kv.wire
    return dtype if wire == "native" else f"{dtype} over {wire}"


def _rounded(config: Config, role: Role) -> str:
    """What is rounded further than the model's own numbers; auto and bf16 are the same ones."""
    weights, activations = config.weights_of(role), config.activations_of(role)
    form = "" if weights in ("auto", "bf16") else f" from {weights}"
    # Weights of bf16 are multiplied in bf16.
    return form if activations == "bf16" or weights == "bf16" else f"{form}, activations {activations}"
