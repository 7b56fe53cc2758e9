"""What shape a model has and which maths it wants, read from its own metadata. Knows no tensor.

A field that changes the maths and isn't implemented here is an error that names it: a model that
would answer differently from its authors' code doesn't load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    rope_theta: float
    norm_epsilon: float
    tied: bool
    """The output head is the embedding."""
    context: int
    """Positions the model was made for."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight the model declares: Hugging Face's name → shape."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {
                f"{at}.input_layernorm.weight": (self.hidden,),
                f"{at}.self_attn.q_proj.weight": (q, self.hidden),
                f"{at}.self_attn.k_proj.weight": (kv, self.hidden),
                f"{at}.self_attn.v_proj.weight": (kv, self.hidden),
                f"{at}.self_attn.o_proj.weight": (self.hidden, q),
                f"{at}.post_attention_layernorm.weight": (self.hidden,),
                f"{at}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{at}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{at}.mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        return shapes


class UnsupportedModel(InvalidRequest):
    """A model this version can't run exactly; the message names the field and what works."""


SHAPES: Mapping[str, ModelConfig] = {
    # Small enough for a test of a thousand requests, with every feature of the real thing.
    "tiny": ModelConfig(
        layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=320,
        rope_theta=10000.0, norm_epsilon=1e-5, tied=True, context=8192,
    ),
    "llama-1b": ModelConfig(
        layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocabulary=128256,
        rope_theta=500000.0, norm_epsilon=1e-5, tied=True, context=8192,
    ),
    "llama-8b": ModelConfig(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocabulary=128256,
        rope_theta=500000.0, norm_epsilon=1e-5, tied=False, context=8192,
    ),
}  # fmt: skip
"""Shapes that `random:<shape>` names. The vocabularies hold the byte tokenizer's 260 ids."""


def random_shape(name: str) -> ModelConfig:
    """`random:<shape>` → its configuration."""
    shape = name.removeprefix("random:")
    if shape not in SHAPES:
        raise UnsupportedModel(f"random:{shape} is not a known shape; known: {', '.join(sorted(SHAPES))}")
    return SHAPES[shape]


# Hugging Face's fields that leave the maths as it is here only at these values.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "pretraining_tp": (1, None),
}


def from_folder(folder: Path) -> ModelConfig:
    """Read `config.json` of a Hugging Face folder."""
    path = folder / "config.json"
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: {error}; a model folder needs a readable config.json") from error
    kind = fields.get("model_type")
    if kind != "llama":
        raise UnsupportedModel(f"{path}: model_type {kind!r} is not supported in this version; llama is")
    for field, plain in _PLAIN.items():
        if fields.get(field) not in plain:
            raise UnsupportedModel(f"{path}: {field}={fields[field]!r} changes the maths and is not supported")
    rope = fields.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModel(f"{path}: rope_parameters.rope_type={rope['rope_type']!r} is not supported")
    try:
        heads = int(fields["num_attention_heads"])
        return ModelConfig(
            layers=int(fields["num_hidden_layers"]),
            hidden=int(fields["hidden_size"]),
            heads=heads,
            kv_heads=int(fields.get("num_key_value_heads") or heads),
            head_dim=int(fields.get("head_dim") or fields["hidden_size"] // heads),
            intermediate=int(fields["intermediate_size"]),
            vocabulary=int(fields["vocab_size"]),
            rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0),
            norm_epsilon=float(fields["rms_norm_eps"]),
            tied=bool(fields.get("tie_word_embeddings", False)),
            context=int(fields["max_position_embeddings"]),
        )
    except KeyError as error:
        raise UnsupportedModel(f"{path}: field {error} is missing") from error


def from_gguf(fields: Mapping[str, Any], tensors: set[str], path: str) -> ModelConfig:
    """From GGUF metadata; `tensors` are the names in the file."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise UnsupportedModel(f"{path}: architecture {kind!r} is not supported in this version; llama is")
    odd = sorted(key for key in fields if key.startswith("llama.rope.scaling") or key.startswith("llama.expert"))
    if odd or "rope_freqs.weight" in tensors:
        raise UnsupportedModel(f"{path}: {odd[0] if odd else 'rope_freqs.weight'} changes the maths, not supported")
    try:
        heads, hidden = int(fields["llama.attention.head_count"]), int(fields["llama.embedding_length"])
        head_dim = int(fields.get("llama.attention.key_length", hidden // heads))
        if int(fields.get("llama.rope.dimension_count", head_dim)) != head_dim:
            raise UnsupportedModel(f"{path}: llama.rope.dimension_count differs from the head size {head_dim}")
        return ModelConfig(
            layers=int(fields["llama.block_count"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(fields.get("llama.attention.head_count_kv", heads)),
            head_dim=head_dim,
            intermediate=int(fields["llama.feed_forward_length"]),
            vocabulary=int(fields.get("llama.vocab_size") or len(fields["tokenizer.ggml.tokens"])),
            rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
            norm_epsilon=float(fields["llama.attention.layer_norm_rms_epsilon"]),
            tied="output.weight" not in tensors,
            context=int(fields["llama.context_length"]),
        )
    except KeyError as error:
        raise UnsupportedModel(f"{path}: metadata {error} is missing") from error
