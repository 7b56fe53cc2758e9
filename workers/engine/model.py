"""The forward pass: a batch of tokens in, logits out. Knows paged KV, not sequences or roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from workers.engine.architectures import Activation
from workers.engine.batch import Batch, BatchTensors, batch_tensors, looked_at
from workers.engine.model_memory import available_bytes, check_room
from workers.engine.rope import rope_table
from workers.engine.weights import Weights, stacked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A matrix product, with or without a bias. weight: [out, in]"""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One layer: its weights, products that share an input as one, and how it looks back."""

    attention_norm: Tensor
    qkv: _Product
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: _Product
    attention_end_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: _Product
    down: _Product
    mlp_end_norm: Tensor | None
    window: int | None
    rope: int
    """Which of the model's tables."""


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
        taken = _Taken(weights, device)
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

    def _attention(self, normed: Tensor, layer: _Layer, cache: Tensor, rope: Tensor, batch: BatchTensors) -> Tensor:
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


class _Taken:
    """A model's weights on their way to a device."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._config = weights.config
        self._tensors = weights.tensors
        self._device = device

    def layer(self, index: int) -> _Layer:
        config, at = self._config, f"model.layers.{index}"
        kind, window = config.architecture, config.windows[index]
        before_mlp = "pre_feedforward_layernorm" if kind.sandwich_norms else "post_attention_layernorm"
        return _Layer(
            attention_norm=self.norm(f"{at}.input_layernorm.weight"),
            qkv=self._product(*(f"{at}.self_attn.{part}_proj" for part in "qkv")),
            query_norm=self.norm(f"{at}.self_attn.q_norm.weight") if kind.qk_norm else None,
            key_norm=self.norm(f"{at}.self_attn.k_norm.weight") if kind.qk_norm else None,
            output=self._product(f"{at}.self_attn.o_proj"),
            attention_end_norm=self.norm(f"{at}.post_attention_layernorm.weight") if kind.sandwich_norms else None,
            mlp_norm=self.norm(f"{at}.{before_mlp}.weight"),
            gate_up=self._product(*(f"{at}.mlp.{part}_proj" for part in ("gate", "up"))),
            down=self._product(f"{at}.mlp.down_proj"),
            mlp_end_norm=self.norm(f"{at}.post_feedforward_layernorm.weight") if kind.sandwich_norms else None,
            window=window,
            rope=0 if window is None or config.local_rope is None else 1,
        )

    def tensor(self, *names: str) -> Tensor:
        """One tensor of all their rows."""
        return stacked([self._tensors[name] for name in names]).to(self._device)

    def norm(self, name: str) -> Tensor:
        """What it multiplies by. Where that is 1 + weight, in fp32: rounded, it would be another."""
        weight = self.tensor(name)
        return 1.0 + weight.float() if self._config.architecture.plus_one_norms else weight

    def _product(self, *names: str) -> _Product:
        biased = f"{names[0]}.bias" in self._tensors
        return _Product(
            weight=self.tensor(*(f"{name}.weight" for name in names)),
            bias=self.tensor(*(f"{name}.bias" for name in names)) if biased else None,
        )
