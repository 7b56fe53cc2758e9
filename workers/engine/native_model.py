"""The forward pass in C++, for bf16 on CPUs that multiply it. Same call as `model.Model`; knows no sequence.

Rows are fp32 between products, which take bf16, or int8 where that is asked for; KV is in bf16 or
fp8. However tokens are batched, chunked, cached and placed, their logits are the same bits, as long
as every worker computes this way.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Logits
from kernels.cpu.decoder import BiasedPanels, Decoder, DecoderEnds, DecoderLayer, DecoderShape
from kernels.cpu.products import Activations
from workers.engine.batch import Batch
from workers.engine.layout import STACKED
from workers.engine.model_config import ModelConfig
from workers.engine.packed_weights import PackedWeights
from workers.engine.rope import rope_table
from workers.engine.weights import Weights, stacked


def can_run(config: ModelConfig) -> bool:
    """Whether its sizes are what the kernels are made for."""
    sizes = (config.hidden, config.head_dim, config.intermediate, config.heads * config.head_dim)
    return all(size % 32 == 0 for size in sizes)


class NativeModel:
    """A decoder on some threads of this CPU."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weights: Weights,
        packed: PackedWeights,
        *,
        max_context: int,
        threads: int,
        activations: Activations = "bf16",
    ) -> None:
        assert can_run(weights.config), "its sizes are no multiples of 32"
        self.config = config = weights.config
        ropes = [config.rope, *([config.local_rope] if config.local_rope else [])]
        taken = _Taken(weights, packed, [rope_table(rope, max_context, config.head_dim) for rope in ropes])
        layers = [taken.layer(index) for index in range(config.layers)]
        ends = DecoderEnds(
            # A copy: as a part of all the weights it would keep all of them.
            embedding=weights.tensors["model.embed_tokens.weight"].clone(),
            norm=taken.norm("model.norm.weight"),
            head=BiasedPanels(packed["head"], None),
        )
        self._decoder = Decoder(library, _shape(config, activations), layers, ends, threads)

    def forward(self, batch: Batch, arena: Tensor) -> Logits:
        """Writes the batch's KV into `arena` and returns the wanted rows' logits."""
        return self._decoder.step(arena, batch.tokens, batch.segments, batch.wanted)

    def products(self, batch: Batch, arena: Tensor) -> None:
        """The matrix products of `forward` alone: its least time, for measuring."""
        self._decoder.products(arena, batch.tokens, batch.segments, batch.wanted)


def _shape(config: ModelConfig, activations: Activations) -> DecoderShape:
    # Rounded to the weights' type before it multiplies, as their authors do.
    scale = torch.tensor(config.hidden**0.5, dtype=torch.bfloat16).item()
    return DecoderShape(
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate,
        vocabulary=config.vocabulary,
        gate=config.activation,
        epsilon=config.norm_epsilon,
        attention_scale=config.attention_scale,
        attention_soft_cap=config.attention_soft_cap,
        logit_soft_cap=config.logit_soft_cap,
        embedding_scale=scale if config.architecture.scaled_embedding else 1.0,
        activations=activations,
    )


@dataclass(frozen=True, slots=True)
class _Taken:
    """Weights on their way into a decoder."""

    weights: Weights
    packed: PackedWeights
    ropes: list[Tensor]

    def layer(self, index: int) -> DecoderLayer:
        config, at = self.weights.config, f"model.layers.{index}"
        kind, window = config.architecture, config.windows[index]
        (qkv, gate_up) = STACKED
        before_mlp = "pre_feedforward_layernorm" if kind.sandwich_norms else "post_attention_layernorm"
        return DecoderLayer(
            attention_norm=self.norm(f"{at}.input_layernorm.weight"),
            query_norm=self.norm(f"{at}.self_attn.q_norm.weight") if kind.qk_norm else None,
            key_norm=self.norm(f"{at}.self_attn.k_norm.weight") if kind.qk_norm else None,
            attention_end_norm=self.norm(f"{at}.post_attention_layernorm.weight") if kind.sandwich_norms else None,
            mlp_norm=self.norm(f"{at}.{before_mlp}.weight"),
            mlp_end_norm=self.norm(f"{at}.post_feedforward_layernorm.weight") if kind.sandwich_norms else None,
            qkv=self._product(f"{at}.qkv", *(f"{at}.{part}" for part in qkv)),
            output=self._product(f"{at}.output", f"{at}.self_attn.o_proj"),
            gate_up=self._product(f"{at}.gate_up", *(f"{at}.{part}" for part in gate_up), alternating=True),
            down=self._product(f"{at}.down", f"{at}.mlp.down_proj"),
            rope=self.ropes[0 if window is None or config.local_rope is None else 1],
            window=window,
        )

    def norm(self, name: str) -> Tensor:
        weight = self.weights.tensors[name].float()
        return 1.0 + weight if self.weights.config.architecture.plus_one_norms else weight

    def _product(self, name: str, *parts: str, alternating: bool = False) -> BiasedPanels:
        tensors = self.weights.tensors
        if f"{parts[0]}.bias" not in tensors:
            return BiasedPanels(self.packed[name], None)
        biases = [tensors[f"{part}.bias"].float() for part in parts]
        if alternating:
            return BiasedPanels(self.packed[name], torch.stack([bias.view(-1, 16) for bias in biases], 1).reshape(-1))
        return BiasedPanels(self.packed[name], stacked(biases))
