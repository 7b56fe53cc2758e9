"""What makes each family of decoders itself: one description each. Knows no file and no tensor.

They are all one machine (RMS norms, rotary positions, grouped attention, a gated MLP) with
switches; a new family is a new entry here, and a switch where it has maths of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]

Windows: TypeAlias = Literal["never", "always", "late", "alternating"]
"""Which layers slide a window over the past: none · all, when there is a window · those from
`max_window_layers` on, when they are switched on · all but every `period`-th."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family. What a model's own metadata doesn't say is as its authors' code has it."""

    model_type: str
    """Its name in config.json."""
    gguf: str | None
    """Its name in GGUF files; Mistral's call themselves llama."""
    interleaved_gguf: bool = False
    """GGUF files keep the rows of Q and K in pairs, for a rotary kernel that turns neighbours."""

    qkv_bias: bool = False
    """Q, K and V always have biases."""
    optional_attention_bias: bool = False
    """config.json may switch on biases of Q, K, V and the output."""
    optional_mlp_bias: bool = False
    qk_norm: bool = False
    """Each head's query and key are normalised before they turn."""
    plus_one_norms: bool = False
    """Norms multiply by 1 + weight."""
    sandwich_norms: bool = False
    """Norms after attention and MLP too, before they are added."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of their size."""
    query_scalar: bool = False
    """Scores are divided by the root of `query_pre_attn_scalar`, not of the head's size."""
    soft_caps: bool = False
    """Scores and logits may be squeezed through a tanh."""
    default_soft_caps: tuple[float | None, float | None] = (None, None)
    """Of scores and of logits."""

    activation: Activation = "silu"
    activation_field: str = "hidden_act"
    windows: Windows = "never"
    period: int = 1
    default_window: int | None = None
    head_dim: int | None = None
    """None: hidden size / heads."""
    kv_heads_given: bool = True
    """config.json must say how many KV heads; without it, as many as query heads."""
    tied: bool = False
    theta: float = 10_000.0
    local_theta: float | None = None
    """Layers with a window turn by this base."""


LLAMA = Architecture(
    model_type="llama",
    gguf="llama",
    interleaved_gguf=True,
    optional_attention_bias=True,
    optional_mlp_bias=True,
    kv_heads_given=False,
)
MISTRAL = Architecture(model_type="mistral", gguf=None, windows="always", default_window=4096)
QWEN2 = Architecture(model_type="qwen2", gguf="qwen2", qkv_bias=True, windows="late", default_window=4096)
QWEN3 = Architecture(
    model_type="qwen3",
    gguf="qwen3",
    optional_attention_bias=True,
    qk_norm=True,
    head_dim=128,
    windows="late",
    default_window=4096,
)
GEMMA2 = Architecture(
    model_type="gemma2",
    gguf="gemma2",
    optional_attention_bias=True,
    plus_one_norms=True,
    sandwich_norms=True,
    scaled_embedding=True,
    query_scalar=True,
    soft_caps=True,
    default_soft_caps=(50.0, 30.0),
    activation="gelu_tanh",
    activation_field="hidden_activation",
    windows="alternating",
    period=2,
    default_window=4096,
    head_dim=256,
    tied=True,
)
GEMMA3 = Architecture(
    model_type="gemma3_text",
    gguf="gemma3",
    optional_attention_bias=True,
    qk_norm=True,
    plus_one_norms=True,
    sandwich_norms=True,
    scaled_embedding=True,
    query_scalar=True,
    soft_caps=True,
    activation="gelu_tanh",
    activation_field="hidden_activation",
    windows="alternating",
    period=6,
    default_window=4096,
    head_dim=256,
    tied=True,
    theta=1_000_000.0,
    local_theta=10_000.0,
)

ARCHITECTURES = {each.model_type: each for each in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)}
GGUF_ARCHITECTURES = {each.gguf: each for each in ARCHITECTURES.values() if each.gguf}
