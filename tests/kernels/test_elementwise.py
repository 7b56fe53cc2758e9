"""Norms, rotations and gates, against transformers' own code."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels import apply_rope, rms_norm, rope_table, swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(7, 96).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight.data, 1e-5), norm(x).detach())


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotations_have_the_bits_of_transformers(theta: float) -> None:
    heads, dim, positions = 3, 32, 300
    parameters = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, head_dim=dim, rope_parameters=parameters,
        max_position_embeddings=positions,
    )  # fmt: skip
    x = torch.randn(1, heads, positions, dim)
    cosines, sines = LlamaRotaryEmbedding(config)(x, torch.arange(positions)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cosines, sines)
    table = rope_table(positions, dim, theta)
    assert torch.equal(table[:, 0], cosines[0])
    assert torch.equal(table[:, 1], sines[0])
    turned = apply_rope(x[0].transpose(0, 1), table)
    assert torch.equal(turned, expected[0].transpose(0, 1))


def test_a_rotation_keeps_what_a_query_says_about_a_key_at_a_distance() -> None:
    table = rope_table(100, 16, 10_000.0)
    query, key = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def product(at_query: int, at_key: int) -> float:
        turned = apply_rope(query, table[at_query][None]) * apply_rope(key, table[at_key][None])
        return float(turned.sum())

    assert product(10, 3) == pytest.approx(product(97, 90), abs=1e-4)
    assert product(10, 3) != pytest.approx(product(97, 20), abs=1e-4)


def test_the_gate_is_silu() -> None:
    gate, up = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)
