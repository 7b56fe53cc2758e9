"""The forward pass: a batch of tokens in, logits out. Knows paged KV, not sequences or roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from workers.engine.weights import Weights


class Chunk(NamedTuple):
    """Some prompt tokens of one sequence: rows [first_row, last_row) of the batch."""

    first_row: int
    last_row: int
    start: int
    """Position of the first of them."""
    blocks: Tensor
    """[whole splits] the sequence's block ids, padded with any valid id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step: decode rows first, then prompt chunks."""

    tokens: Tensor
    """[rows] ids."""
    positions: Tensor
    """[rows]"""
    blocks: Tensor
    """[rows] the block each row's KV goes to, and `offsets` [rows] the place in it."""
    offsets: Tensor
    decode_rows: int
    table: kernels.DecodeTable | None
    chunks: tuple[Chunk, ...]
    logit_rows: Tensor
    """[wanted] rows whose logits are wanted."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's weights, products that share an input fused: [out, in]."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Model:
    """A decoder of the Llama family on one device. `arena` is passed in: the cache owns it."""

    def __init__(self, weights: Weights, *, max_context: int, device: torch.device) -> None:
        self.config = config = weights.config

        def take(name: str) -> Tensor:
            return weights.tensors[name].to(device)

        self._layers: list[_Layer] = []
        for index in range(config.layers):
            at = f"model.layers.{index}"
            qkv = torch.cat([take(f"{at}.self_attn.{part}_proj.weight") for part in "qkv"])
            gate_up = torch.cat([take(f"{at}.mlp.{part}_proj.weight") for part in ("gate", "up")])
            self._layers.append(
                _Layer(
                    take(f"{at}.input_layernorm.weight"),
                    qkv,
                    take(f"{at}.self_attn.o_proj.weight"),
                    take(f"{at}.post_attention_layernorm.weight"),
                    gate_up,
                    take(f"{at}.mlp.down_proj.weight"),
                )
            )
        self._embedding = take("model.embed_tokens.weight")
        self._head = self._embedding if config.tied else take("lm_head.weight")
        self._norm = take("model.norm.weight")
        table = kernels.rope_table(max_context, config.head_dim, config.rope_theta)
        self._rope = table.to(device=device, dtype=self._embedding.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch, arena: Tensor) -> Tensor:
        """Writes the batch's KV into `arena` and returns logits [wanted, vocabulary] in fp32."""
        epsilon = self.config.norm_epsilon
        rope = self._rope[batch.positions]
        hidden = self._embedding[batch.tokens]
        for index, layer in enumerate(self._layers):
            normed = kernels.rms_norm(hidden, layer.attention_norm, epsilon)
            hidden = hidden + self._attention(normed, layer, arena[:, index], rope, batch)
            normed = kernels.rms_norm(hidden, layer.mlp_norm, epsilon)
            gate, up = kernels.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + kernels.linear(kernels.swiglu(gate, up), layer.down)
        wanted = kernels.rms_norm(hidden[batch.logit_rows], self._norm, epsilon)
        return kernels.linear(wanted, self._head).float()

    def _attention(self, normed: Tensor, layer: _Layer, cache: Tensor, rope: Tensor, batch: Batch) -> Tensor:
        config = self.config
        q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = kernels.linear(normed, layer.qkv).split((q_size, kv_size, kv_size), dim=-1)
        rows = normed.shape[0]
        q = kernels.apply_rope(q.reshape(rows, config.heads, config.head_dim), rope)
        k = kernels.apply_rope(k.reshape(rows, config.kv_heads, config.head_dim), rope)
        kernels.write_kv(cache, k, v.reshape(rows, config.kv_heads, config.head_dim), batch.blocks, batch.offsets)
        scale = config.head_dim**-0.5
        parts: list[Tensor] = []
        if batch.table is not None:
            parts.append(kernels.decode_attention(q[: batch.decode_rows], cache, batch.table, scale))
        for chunk in batch.chunks:
            rows_of_chunk = q[chunk.first_row : chunk.last_row]
            parts.append(kernels.prefill_attention(rows_of_chunk, cache, chunk.blocks, chunk.start, scale))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return kernels.linear(mixed.reshape(rows, q_size), layer.output)
