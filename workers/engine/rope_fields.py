"""Rotary positions as config.json says them, in today's names and in older ones. Knows no other field."""

from __future__ import annotations

from typing import Any

from workers.engine.architectures import Architecture
from workers.engine.model_fields import Fields
from workers.engine.rope import Dynamic, Linear, Llama3, Rope, Scaling, Yarn, yarn_attention_factor


def read_ropes(fields: Fields, kind: Architecture) -> tuple[Rope, Rope | None]:
    """Of all layers, and of those with a window where they have their own."""
    parameters, scaling = fields.group("rope_parameters"), fields.group("rope_scaling")
    theta = fields.number("rope_theta", kind.theta)
    if kind.local_theta is None:
        name = "rope_scaling" if scaling else "rope_parameters"
        return _rope(fields, name, scaling or parameters or {}, theta), None
    local_theta = fields.number("rope_local_base_freq", kind.local_theta)
    if parameters is not None and not set(parameters) <= {"full_attention", "sliding_attention"}:
        raise fields.wrong("rope_parameters", "full_attention and sliding_attention, with fields of their own")
    by_layer = parameters or {}
    full: dict[str, Any] = {**(by_layer.get("full_attention") or {}), **(scaling or {})}
    rope = _rope(fields, "rope_parameters.full_attention", full, theta)
    local: dict[str, Any] = by_layer.get("sliding_attention") or {}
    return rope, _rope(fields, "rope_parameters.sliding_attention", local, local_theta)


def _rope(fields: Fields, name: str, values: dict[str, Any], theta: float) -> Rope:
    inner = Fields(f"{fields.where}: {name}", values)
    for whole in (fields, inner):
        whole.plain("partial_rotary_factor", 1)
    theta = inner.number("rope_theta", theta)
    scaling = _scaling(fields, inner)
    inner.refuse_unread()
    return Rope(theta=theta, scaling=scaling)


def _scaling(fields: Fields, inner: Fields) -> Scaling | None:
    kind = inner.text("rope_type", inner.text("type", "default"))
    declared = fields.integer("max_position_embeddings")
    match kind:
        case "default":
            return None
        case "linear":
            inner.ignore("original_max_position_embeddings")
            return Linear(factor=inner.number("factor"))
        case "dynamic":
            inner.plain("original_max_position_embeddings", declared)
            return Dynamic(factor=inner.number("factor"), original=declared)
        case "llama3":
            return Llama3(
                factor=inner.number("factor"),
                low_frequency_factor=inner.number("low_freq_factor"),
                high_frequency_factor=inner.number("high_freq_factor"),
                original=_original(fields, inner, declared),
            )
        case "yarn":
            return _yarn(inner, declared, _original(fields, inner, declared))
        case _:
            raise inner.wrong("rope_type", "default, linear, dynamic, llama3, yarn")


def _original(fields: Fields, inner: Fields, declared: int) -> int:
    within = inner.integer("original_max_position_embeddings", declared)
    return fields.integer("original_max_position_embeddings", within)


def _yarn(inner: Fields, declared: int, original: int) -> Yarn:
    factor = inner.number("factor", declared / original)
    every, all_dimensions = inner.number_or_none("mscale"), inner.number_or_none("mscale_all_dim")
    natural = yarn_attention_factor(factor)
    if every and all_dimensions:
        natural = yarn_attention_factor(factor, every) / yarn_attention_factor(factor, all_dimensions)
    inner.ignore("finetuned")
    return Yarn(
        factor=factor,
        original=original,
        attention_factor=inner.number("attention_factor", natural),
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        truncate=inner.flag("truncate", default=True),
    )
