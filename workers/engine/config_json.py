"""A model's configuration from a Hugging Face folder's config.json. Knows no weights.

Names and defaults are those of transformers 5, and the names before it. Fields that say how a
model was trained, stored or generated with are known to be harmless; any other field that nothing
here reads is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workers.engine.architectures import ARCHITECTURES, Activation, Architecture
from workers.engine.model_config import ModelConfig, UnsupportedModel
from workers.engine.model_fields import Fields
from workers.engine.rope import Dynamic, Rope, Yarn
from workers.engine.rope_fields import read_ropes

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

_HARMLESS = frozenset(
    [
        "architectures",
        "auto_class",
        "model_type",
        "name_or_path",
        "_name_or_path",
        "transformers_version",
        "transformers.js_config",
        "torch_dtype",
        "dtype",
        "use_cache",
        "cache_implementation",
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "residual_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "pretraining_tp",
        "is_llama_config",
        "unsloth_version",
        "unsloth_fixed",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "tokenizer_class",
        "prefix",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "output_scores",
        "torchscript",
        "use_bfloat16",
        "chunk_size_feed_forward",
        "pruned_heads",
        "tf_legacy_loss",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "typical_p",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "gradient_checkpointing",
        "tie_encoder_decoder",
        "rope_interleaved",
    ]
)


def from_folder(folder: Path) -> ModelConfig:
    """Read `config.json`. Raises UnsupportedModel naming the field, its value and what works."""
    path = folder / "config.json"
    try:
        values: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: {error}; a model folder needs a readable config.json") from error
    if not isinstance(values, dict):
        raise UnsupportedModel(f"{path}: a {type(values).__name__}; a model's configuration is a group of fields")
    fields = Fields(str(path), values)  # pyright: ignore[reportUnknownArgumentType]
    kind = fields.text("model_type", "")
    if kind not in ARCHITECTURES:
        raise fields.wrong("model_type", ", ".join(sorted(ARCHITECTURES)))
    config = _read(fields, ARCHITECTURES[kind])
    fields.refuse_unread(_HARMLESS)
    return config


def _read(fields: Fields, kind: Architecture) -> ModelConfig:
    hidden, heads, layers = (
        fields.integer(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    kv_heads = _kv_heads(fields, kind, heads)
    head_dim = fields.integer("head_dim", kind.head_dim or hidden // heads)
    rope, local_rope = read_ropes(fields, kind)
    biased = fields.flag("attention_bias", default=False) if kind.optional_attention_bias else False
    if not kind.optional_attention_bias:
        fields.plain("attention_bias", False, *([True] if kind.qkv_bias else []))
    if not kind.optional_mlp_bias:
        fields.plain("mlp_bias", False)
    fields.plain("is_encoder_decoder", False)
    fields.plain("is_decoder", False, True)
    fields.plain("add_cross_attention", False)
    fields.plain("rope_interleaved", False)
    fields.plain("use_mrope", False)
    return ModelConfig(
        architecture=kind,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=even(fields.where, head_dim),
        intermediate=fields.integer("intermediate_size"),
        vocabulary=fields.integer("vocab_size"),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", default=kind.tied),
        context=extended_context(fields.integer("max_position_embeddings"), rope),
        rope=rope,
        local_rope=local_rope,
        windows=_windows(fields, kind, layers),
        activation=_activation(fields, kind),
        qkv_bias=kind.qkv_bias or biased,
        output_bias=biased,
        mlp_bias=fields.flag("mlp_bias", default=False) if kind.optional_mlp_bias else False,
        attention_scale=_query_scalar(fields, kind, head_dim) ** -0.5,
        attention_soft_cap=_soft_cap(fields, kind, "attn_logit_softcapping", kind.default_soft_caps[0]),
        logit_soft_cap=_soft_cap(fields, kind, "final_logit_softcapping", kind.default_soft_caps[1]),
    )


def even(where: str, head_dim: int) -> int:
    """A head turns in pairs."""
    if head_dim % 2:
        raise UnsupportedModel(f"{where}: heads of {head_dim} numbers can't be turned in pairs; even sizes work")
    return head_dim


def extended_context(declared: int, rope: Rope) -> int:
    """Some scalings say how long the context became; the declared one is then the original."""
    match rope.scaling:
        case Dynamic(factor=factor) | Yarn(factor=factor):
            return max(declared, int(rope.scaling.original * factor))
        case _:
            return declared


def whole_groups(where: str, heads: int, kv_heads: int) -> int:
    """As many query heads to each KV head."""
    if heads % kv_heads:
        raise UnsupportedModel(f"{where}: {heads} heads can't share {kv_heads} KV heads; a divisor of {heads} works")
    return kv_heads


def _kv_heads(fields: Fields, kind: Architecture, heads: int) -> int:
    if kind.kv_heads_given and not fields.has("num_key_value_heads"):
        raise UnsupportedModel(f"{fields.where}: num_key_value_heads is missing")
    return whole_groups(fields.where, heads, fields.integer("num_key_value_heads", heads))


def _activation(fields: Fields, kind: Architecture) -> Activation:
    default = next(name for name, value in _ACTIVATIONS.items() if value == kind.activation)
    name = fields.text(kind.activation_field, default)
    if name not in _ACTIVATIONS:
        raise fields.wrong(kind.activation_field, ", ".join(_ACTIVATIONS))
    if kind.activation_field != "hidden_act":
        fields.ignore("hidden_act")  # theirs is called otherwise, and both are often there
    return _ACTIVATIONS[name]


def _query_scalar(fields: Fields, kind: Architecture, head_dim: int) -> float:
    return fields.number("query_pre_attn_scalar", 256) if kind.query_scalar else float(head_dim)


def _soft_cap(fields: Fields, kind: Architecture, name: str, default: float | None) -> float | None:
    if kind.soft_caps:
        return fields.number_or_none(name, default)
    fields.plain(name)
    return None


# ---- windows -----------------------------------------------------------------------------------------


def _windows(fields: Fields, kind: Architecture, layers: int) -> tuple[int | None, ...]:
    fields.plain("use_bidirectional_attention", False)
    sliding = [False] * layers
    window = None
    match kind.windows:
        case "never":
            fields.plain("sliding_window")
            fields.plain("use_sliding_window", False)
            fields.ignore("max_window_layers")
        case "always":
            window = _window(fields, kind)
            sliding = [window is not None] * layers
        case "late":
            first = fields.integer_or_none("max_window_layers") if fields.has("max_window_layers") else 28
            window = _window(fields, kind) if fields.flag("use_sliding_window", default=False) else None
            fields.ignore("sliding_window")
            if window is not None:
                sliding = [layer >= (first or 0) for layer in range(layers)]
        case "alternating":
            window = fields.integer("sliding_window", kind.default_window)
            sliding = [bool((layer + 1) % _period(fields, kind)) for layer in range(layers)]
    sliding = _layer_types(fields, kind, sliding)
    return tuple(window if slides else None for slides in sliding)


def _window(fields: Fields, kind: Architecture) -> int | None:
    return fields.integer_or_none("sliding_window") if fields.has("sliding_window") else kind.default_window


def _period(fields: Fields, kind: Architecture) -> int:
    if kind.local_theta is None:
        # Gemma 2's is fixed in its authors' code.
        fields.plain("sliding_window_pattern", kind.period)
        return kind.period
    return fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", kind.period))


def _layer_types(fields: Fields, kind: Architecture, otherwise: list[bool]) -> list[bool]:
    types = fields.items("layer_types")
    if types is None:
        return otherwise
    if len(types) != len(otherwise) or any(each not in ("full_attention", "sliding_attention") for each in types):
        raise fields.wrong("layer_types", f"{len(otherwise)} times full_attention or sliding_attention")
    sliding = [each == "sliding_attention" for each in types]
    if kind.windows == "alternating" or sliding == otherwise:
        return sliding
    if kind.windows == "late" and fields.flag("use_sliding_window", default=False) and _window(fields, kind):
        return sliding
    raise fields.wrong("layer_types", f"what the other fields say: {sum(otherwise)} layers slide")
