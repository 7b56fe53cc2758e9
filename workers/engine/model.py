"""The forward pass: a batch of tokens in, logits out. Knows paged KV, not sequences or roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from workers.engine.architectures import Activation
from workers.engine.batch import Batch, BatchTensors, batch_tensors, looked_at
from workers.engine.layers import Layer, Product, TakenWeights
from workers.engine.model_memory import available_bytes, check_room
from workers.engine.rope import rope_table
from workers.engine.weights import Weights

_GATES: Mapping[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": kernels.swiglu,
    "gelu": kernels.geglu,
    "gelu_tanh": kernels.tanh_geglu,
}


class Model:
    """A decoder on one device. `arena` is passed in: the cache owns it."""

    def __init__(self, weights: Weights, *, max_context: int, device: torch.device) -> None:
        self.config = config = weights.config
        if device.type != "cpu":
            check_room(
                config,
                weights.tensors["model.norm.weight"].dtype,
                available_bytes(device),
                source=config.architecture.model_type,
                where=str(device),
            )
        taken = TakenWeights(weights, device, _product)
        self._layers = [taken.layer(index) for index in range(config.layers)]
        self._embedding = taken.tensor("model.embed_tokens.weight")
        self._head = self._embedding if config.tied else taken.tensor("lm_head.weight")
        self._norm = taken.norm("model.norm.weight")
        dtype = self._embedding.dtype
        # Rounded to the weights' type before it multiplies, as their authors do.
        scale = config.hidden**0.5 if config.architecture.scaled_embedding else None
        self._embedding_scale = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)
        ropes = [config.rope, *([config.local_rope] if config.local_rope else [])]
        self._ropes = [rope_table(rope, max_context, config.head_dim).to(device=device, dtype=dtype) for rope in ropes]
        self._gate = _GATES[config.activation]

    @torch.inference_mode()
    def forward(self, batch: Batch, arena: Tensor) -> kernels.Logits:
        """Writes the batch's KV into `arena` and returns the wanted rows' logits."""
        return looked_at(self._forward(batch_tensors(batch, arena.shape[4], arena.device), arena))

    def _forward(self, batch: BatchTensors, arena: Tensor) -> Tensor:
        epsilon = self.config.norm_epsilon
        ropes = [table[batch.positions] for table in self._ropes]
        hidden = self._embedding[batch.tokens]
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        for index, layer in enumerate(self._layers):
            normed = kernels.rms_norm(hidden, layer.attention_norm, epsilon)
            mixed = self._attention(normed, layer, arena[:, index], ropes[layer.rope], batch)
            hidden = hidden + self._ended(mixed, layer.attention_end_norm)
            normed = kernels.rms_norm(hidden, layer.mlp_norm, epsilon)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + self._ended(layer.down(self._gate(gate, up)), layer.mlp_end_norm)
        wanted = kernels.rms_norm(hidden[batch.logit_rows], self._norm, epsilon)
        logits = kernels.linear(wanted, self._head).float()
        cap = self.config.logit_soft_cap
        return logits if cap is None else kernels.soft_cap(logits, cap)

    def _ended(self, x: Tensor, norm: Tensor | None) -> Tensor:
        return x if norm is None else kernels.rms_norm(x, norm, self.config.norm_epsilon)

    def _attention(self, normed: Tensor, layer: Layer, cache: Tensor, rope: Tensor, batch: BatchTensors) -> Tensor:
        config = self.config
        rows = normed.shape[0]
        q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = torch.split_with_sizes(layer.qkv(normed), (q_size, kv_size, kv_size), dim=-1)
        q = self._ended(q.reshape(rows, config.heads, config.head_dim), layer.query_norm)
        k = self._ended(k.reshape(rows, config.kv_heads, config.head_dim), layer.key_norm)
        q, k = kernels.apply_rope(q, rope), kernels.apply_rope(k, rope)
        kernels.write_kv(cache, k, v.reshape(rows, config.kv_heads, config.head_dim), batch.blocks, batch.offsets)
        look = _Look(config.attention_scale, layer.window, config.attention_soft_cap)
        return layer.output(_looked_up(q, cache, batch, look).reshape(rows, q_size))


class _Look(NamedTuple):
    """How a layer's queries look back."""

    scale: float
    window: int | None
    soft_cap: float | None


def _looked_up(q: Tensor, cache: Tensor, batch: BatchTensors, look: _Look) -> Tensor:
    """What each row's query finds. q: [rows, heads, head_dim] → the same shape."""
    scale, window, cap = look
    parts: list[Tensor] = []
    if batch.table is not None:
        rows = q[: batch.decode_rows]
        parts.append(kernels.decode_attention(rows, cache, batch.table, scale, window=window, soft_cap=cap))
    for chunk in batch.chunks:
        rows = q[chunk.first_row : chunk.last_row]
        parts.append(
            kernels.prefill_attention(rows, cache, chunk.blocks, chunk.start, scale, window=window, soft_cap=cap)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(weight: Tensor, bias: Tensor | None) -> Product:
    return partial(kernels.linear, weight=weight, bias=bias)
