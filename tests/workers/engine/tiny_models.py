"""Tiny configurations of transformers, one for every switch that changes the maths."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = SMALL | {"head_dim": 16, "query_pre_attn_scalar": 20, "rms_norm_eps": 1e-6}


def llama_rope(**rope: Any) -> tuple[str, dict[str, Any]]:
    return "LlamaConfig", SMALL | {"rope_parameters": {"rope_theta": 10000.0} | rope}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped heads": ("LlamaConfig", SMALL),
    "llama, one KV head, tied": ("LlamaConfig", SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, no groups, wide heads": ("LlamaConfig", SMALL | {"num_key_value_heads": 4, "head_dim": 24}),
    "llama, all biases": ("LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama, gelu": ("LlamaConfig", SMALL | {"hidden_act": "gelu"}),
    "llama, linear": llama_rope(rope_type="linear", factor=4.0),
    "llama, llama3": llama_rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
    ),
    "llama, yarn": llama_rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=128),
    "llama, yarn with everything said": llama_rope(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=128, beta_fast=16.0, beta_slow=2.0,
        attention_factor=1.3, truncate=False,
    ),
    "llama, yarn with scales": llama_rope(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.5
    ),
    "llama, dynamic within its length": llama_rope(rope_type="dynamic", factor=2.0),
    "mistral, window": ("MistralConfig", SMALL | {"sliding_window": 33, "head_dim": 16}),
    "mistral, no window": ("MistralConfig", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen2, tied, later layers slide": (
        "Qwen2Config",
        SMALL | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 16}),
    "qwen3, biases, some layers slide": (
        "Qwen3Config",
        SMALL | {
            "head_dim": 24, "attention_bias": True, "use_sliding_window": True, "sliding_window": 300,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2": (
        "Gemma2Config",
        GEMMA | {"sliding_window": 40, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2, no caps, untied": (
        "Gemma2Config",
        GEMMA | {
            "sliding_window": 257, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "tie_word_embeddings": False, "attention_bias": True,
        },
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA | {"sliding_window": 40, "num_hidden_layers": 7}),
    "gemma3, scaled, own layers": (
        "Gemma3TextConfig",
        GEMMA | {
            "sliding_window": 256, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
}  # fmt: skip


def config_of(case: str, **more: Any) -> Any:
    name, fields = CASES[case]
    return getattr(transformers, name)(**fields | more)


def some_tokens(count: int, seed: int = 0, below: int = SMALL["vocab_size"]) -> list[int]:
    return torch.randint(0, below, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]
