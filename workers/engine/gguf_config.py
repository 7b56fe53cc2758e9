"""A model's configuration from a GGUF file's metadata. Knows no weights.

Keys and defaults are llama.cpp's, some of which are in its code rather than in the files: Gemma's
windows and soft caps, and the two sizes of it whose queries are scaled otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from workers.engine.architectures import GEMMA2, GEMMA3, GGUF_ARCHITECTURES, QWEN2, QWEN3, Architecture
from workers.engine.config_json import even, extended_context, whole_groups
from workers.engine.model_config import ModelConfig, UnsupportedModel
from workers.engine.model_fields import Fields
from workers.engine.rope import Divided, Linear, Rope, Scaling, Yarn, yarn_attention_factor

_LAYERS_OF_27B = {GEMMA2.model_type: 46, GEMMA3.model_type: 62}


def from_gguf(
    metadata: Mapping[str, Any], tensors: Collection[str], path: str, *, divisors: tuple[float, ...] | None = None
) -> ModelConfig:
    """`tensors`: the names in the file  `divisors`: the values of rope_freqs.weight, if it is there."""
    general = Fields(path, metadata, prefix="general.")
    name = general.text("architecture", "")
    if name not in GGUF_ARCHITECTURES:
        raise general.wrong("architecture", ", ".join(sorted(GGUF_ARCHITECTURES)))
    general.plain("type", "model")
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModel(
            f"{path}: split.count={metadata['split.count']}: a model in several GGUF files is not supported; "
            "join them first (llama-gguf-split --merge)"
        )
    kind = GGUF_ARCHITECTURES[name]
    fields = Fields(path, metadata, prefix=f"{name}.")
    vocabulary = fields.integer("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    config = _read(fields, kind, vocabulary, frozenset(tensors), divisors)
    for harmless in ("attention.causal", "use_parallel_residual"):
        fields.plain(harmless, harmless == "attention.causal")
    for absent in ("expert_count", "expert_used_count", "pooling_type"):
        fields.plain(absent, 0)
    fields.refuse_unread(("tensor_data_layout", "rope.scaling.finetuned"))
    return config


def _read(
    fields: Fields, kind: Architecture, vocabulary: int, tensors: frozenset[str], divisors: tuple[float, ...] | None
) -> ModelConfig:
    layers, heads, hidden = (
        fields.integer(name) for name in ("block_count", "attention.head_count", "embedding_length")
    )
    head_dim = fields.integer("attention.key_length", hidden // heads)
    for same in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(same, head_dim) != head_dim:
            raise fields.wrong(same, f"{head_dim}, the size of a head")
    context = fields.integer("context_length")
    rope, local_rope = _ropes(fields, kind, context, divisors)
    return ModelConfig(
        architecture=kind,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=whole_groups(fields.where, heads, fields.integer("attention.head_count_kv", heads)),
        head_dim=even(fields.where, head_dim),
        intermediate=fields.integer("feed_forward_length"),
        vocabulary=vocabulary,
        norm_epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        context=extended_context(context, rope),
        rope=rope,
        local_rope=local_rope,
        windows=_windows(fields, kind, layers, context),
        activation=kind.activation,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        attention_scale=_attention_scale(fields, kind, layers, hidden // heads, head_dim),
        attention_soft_cap=_soft_cap(fields, kind, "attn_logit_softcapping", kind.default_soft_caps[0]),
        logit_soft_cap=_soft_cap(fields, kind, "final_logit_softcapping", kind.default_soft_caps[1]),
    )


def _attention_scale(fields: Fields, kind: Architecture, layers: int, share: int, head_dim: int) -> float:
    odd = _LAYERS_OF_27B.get(kind.model_type) == layers
    return fields.number("attention.scale", (share if odd else head_dim) ** -0.5)


def _soft_cap(fields: Fields, kind: Architecture, name: str, default: float | None) -> float | None:
    if kind.soft_caps:
        return fields.number_or_none(name, default)
    fields.plain(name, 0.0)
    return None


def _windows(fields: Fields, kind: Architecture, layers: int, context: int) -> tuple[int | None, ...]:
    window = _window(fields, kind)
    if kind.windows != "alternating":
        # Mistral calls itself llama, and slides in every layer. Qwen's layers aren't told apart here.
        if kind in (QWEN2, QWEN3) and window is not None and window < context:
            raise fields.wrong("attention.sliding_window", f"0, or the whole context of {context}")
        return (window if window is not None and window < context else None,) * layers
    pattern = _pattern(fields, kind, layers)
    return tuple(window if slides else None for slides in pattern)


def _window(fields: Fields, kind: Architecture) -> int | None:
    """0 is none."""
    name = "attention.sliding_window"
    if kind is GEMMA2:
        return fields.integer(name, kind.default_window)
    return None if fields.raw(name) == 0 else fields.integer_or_none(name)


def _pattern(fields: Fields, kind: Architecture, layers: int) -> list[bool]:
    name = "attention.sliding_window_pattern"
    given = fields.raw(name)
    if isinstance(given, list):
        if len(given) < layers:  # pyright: ignore[reportUnknownArgumentType]
            raise fields.wrong(name, f"{layers} answers, one a layer")
        return [bool(each) for each in given[:layers]]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    period = fields.integer(name, kind.period)
    return [bool((layer + 1) % period) for layer in range(layers)]


def _ropes(
    fields: Fields, kind: Architecture, context: int, divisors: tuple[float, ...] | None
) -> tuple[Rope, Rope | None]:
    rope = Rope(theta=fields.number("rope.freq_base", 10_000.0), scaling=_scaling(fields, context, divisors))
    if kind.local_theta is None:
        return rope, None
    return rope, Rope(theta=fields.number("rope.freq_base_swa", kind.local_theta))


def _scaling(fields: Fields, context: int, divisors: tuple[float, ...] | None) -> Scaling | None:
    legacy = fields.number_or_none("rope.scale_linear")
    kind = fields.text("rope.scaling.type", "linear" if legacy and legacy != 1 else "none")
    factor = fields.number("rope.scaling.factor", legacy or 1.0)
    original = fields.integer("rope.scaling.original_context_length", context)
    if divisors is not None:
        if kind != "none":
            raise fields.wrong("rope.scaling.type", "none, where the file has rope_freqs.weight")
        return Divided(divisors=divisors)
    match kind:
        case "none":
            return None
        case "linear":
            return Linear(factor=factor)
        case "yarn":
            return _yarn(fields, factor, original)
        case _:
            raise fields.wrong("rope.scaling.type", "none, linear, yarn")


def _yarn(fields: Fields, factor: float, original: int) -> Yarn:
    fields.plain("rope.scaling.yarn_ext_factor", 1.0)
    fields.plain("rope.scaling.yarn_log_multiplier", 0.0)
    scale = fields.number("rope.scaling.attn_factor", 1.0) * fields.number("rope.scaling.yarn_attn_factor", 1.0)
    return Yarn(
        factor=factor,
        original=original,
        attention_factor=yarn_attention_factor(factor) * scale,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
    )
