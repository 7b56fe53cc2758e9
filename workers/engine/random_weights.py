"""Seeded random weights of named shapes, for tests and benchmarks. Knows no file.

Every worker of a cluster draws the same numbers. A large model's weights are cut from one long
row of normal numbers, repeated: drawing 8 billion of them would take minutes. Its length is a
prime, so no two rows of a matrix are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from workers.engine.architectures import GEMMA2, GEMMA3, LLAMA, MISTRAL, QWEN2, QWEN3, Architecture
from workers.engine.model_config import ModelConfig, UnsupportedModel
from workers.engine.rope import Dynamic, Linear, Llama3, Rope, Yarn, yarn_attention_factor

_DRAWN = 4_194_301
"""The largest prime below 2 ** 22."""


def _model(
    kind: Architecture,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    head_dim: int | None = None,
    theta: float | None = None,
    tied: bool | None = None,
    context: int = 8192,
    window: int | None = None,
    norm_epsilon: float = 1e-5,
) -> ModelConfig:
    size = head_dim or hidden // heads
    score_cap, logit_cap = kind.default_soft_caps
    slides = {"never": False, "late": False, "always": True, "alternating": True}[kind.windows]
    period = kind.period if kind.windows == "alternating" else layers + 1
    return ModelConfig(
        architecture=kind,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        intermediate=intermediate,
        vocabulary=vocabulary,
        norm_epsilon=norm_epsilon,
        tied=kind.tied if tied is None else tied,
        context=context,
        rope=Rope(theta=theta or kind.theta),
        local_rope=Rope(theta=kind.local_theta) if kind.local_theta else None,
        windows=tuple(window if slides and (layer + 1) % period else None for layer in range(layers)),
        activation=kind.activation,
        qkv_bias=kind.qkv_bias,
        attention_scale=size**-0.5,
        attention_soft_cap=score_cap,
        logit_soft_cap=logit_cap,
    )


def _tiny(kind: Architecture, *, layers: int = 2, tied: bool = False, window: int = 48) -> ModelConfig:
    """Small enough for a test of a thousand requests, with every feature of the real thing."""
    return _model(
        kind, layers=layers, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocabulary=320,
        tied=tied or kind.tied, window=window,
    )  # fmt: skip


_TINY_LLAMA = _tiny(LLAMA)
_YARN = Yarn(factor=4.0, original=2048, attention_factor=yarn_attention_factor(4.0))
_LLAMA3 = Llama3(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original=1024)

SHAPES: Mapping[str, ModelConfig] = {
    "tiny": _tiny(LLAMA, tied=True),
    "tiny-llama": _TINY_LLAMA,
    "tiny-llama-linear": replace(_TINY_LLAMA, rope=Rope(theta=10_000.0, scaling=Linear(factor=4.0))),
    "tiny-llama-dynamic": replace(_TINY_LLAMA, rope=Rope(theta=10_000.0, scaling=Dynamic(factor=4.0, original=2048))),
    "tiny-llama-llama3": replace(_TINY_LLAMA, rope=Rope(theta=500_000.0, scaling=_LLAMA3)),
    "tiny-llama-yarn": replace(_TINY_LLAMA, rope=Rope(theta=10_000.0, scaling=_YARN)),
    "tiny-mistral": _tiny(MISTRAL),
    "tiny-qwen2": _tiny(QWEN2, tied=True),
    "tiny-qwen3": _tiny(QWEN3, tied=True),
    "tiny-gemma2": _tiny(GEMMA2),
    "tiny-gemma3": _tiny(GEMMA3, layers=6),
    "llama-1b": _model(
        LLAMA, layers=16, hidden=2048, heads=32, kv_heads=8, intermediate=8192, vocabulary=128256, theta=500_000.0,
        tied=True,
    ),
    "llama-8b": _model(
        LLAMA, layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256, theta=500_000.0,
    ),
    "qwen3-8b": _model(
        QWEN3, layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=12288, vocabulary=151936,
        theta=1_000_000.0, context=40960, norm_epsilon=1e-6,
    ),
}  # fmt: skip
"""Shapes that `random:<shape>` names. The vocabularies hold the byte tokenizer's 260 ids."""


def random_shape(name: str) -> ModelConfig:
    """`random:<shape>` → its configuration."""
    shape = name.removeprefix("random:")
    if shape not in SHAPES:
        raise UnsupportedModel(f"random:{shape} is not a known shape; known: {', '.join(sorted(SHAPES))}")
    return SHAPES[shape]


def fill_randomly(tensors: Mapping[str, Tensor], config: ModelConfig, digest: str) -> None:
    """Seeded by the digest. `tensors` are all that `config` declares, in its order."""
    generator = torch.Generator().manual_seed(int(digest[:15], 16))
    drawn = torch.randn(min(_DRAWN, config.parameters), generator=generator)
    at = 0
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(0.0 if config.architecture.plus_one_norms else 1.0)
        else:
            at = _cut(drawn, at, tensor.view(-1), scale=tensor.shape[-1] ** -0.5)


def _cut(drawn: Tensor, at: int, to: Tensor, *, scale: float) -> int:
    """Fill `to` with what follows place `at` of the endless row; the place after it."""
    scaled = (drawn * scale).to(to.dtype)
    done = 0
    while done < len(to):
        count = min(len(to) - done, len(scaled) - at)
        to[done : done + count] = scaled[at : at + count]
        done, at = done + count, (at + count) % len(scaled)
    return at
