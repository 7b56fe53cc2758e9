"""A decoder's layers on a device: their weights and products, taken from a model's tensors. Knows no maths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from workers.engine.weights import Weights, stacked

Product: TypeAlias = Callable[[Tensor], Tensor]
"""A matrix product with its weights: [rows, in] → [rows, out]."""
MakeProduct: TypeAlias = Callable[[Tensor, Tensor | None], Product]
"""From a weight [out, in] and a bias [out], both on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: its weights, products that share an input as one, and how it looks back."""

    attention_norm: Tensor
    qkv: Product
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Product
    attention_end_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Product
    down: Product
    mlp_end_norm: Tensor | None
    window: int | None
    rope: int
    """Which of the model's tables."""


class TakenWeights:
    """A model's weights on their way to a device."""

    def __init__(self, weights: Weights, device: torch.device, make_product: MakeProduct) -> None:
        self._config = weights.config
        self._tensors = weights.tensors
        self._device = device
        self._make_product = make_product

    def layer(self, index: int) -> Layer:
        """The index-th, whole."""
        config, at = self._config, f"model.layers.{index}"
        kind, window = config.architecture, config.windows[index]
        before_mlp = "pre_feedforward_layernorm" if kind.sandwich_norms else "post_attention_layernorm"
        return Layer(
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

    def _product(self, *names: str) -> Product:
        biased = f"{names[0]}.bias" in self._tensors
        return self._make_product(
            self.tensor(*(f"{name}.weight" for name in names)),
            self.tensor(*(f"{name}.bias" for name in names)) if biased else None,
        )
