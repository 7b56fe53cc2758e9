"""What shape a model has, which maths it wants and which weights it declares. Knows no file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from diptych.errors import InvalidRequest
from workers.engine.architectures import ARCHITECTURES, Activation, Architecture
from workers.engine.rope import SCALINGS, Divided, Rope


class UnsupportedModel(InvalidRequest):
    """A model this version can't run exactly; the message names the field and what works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder: its family, its numbers, and the switches that models of one family differ in."""

    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    norm_epsilon: float
    tied: bool
    """The output head is the embedding."""
    context: int
    """Positions the model was made for."""
    rope: Rope
    local_rope: Rope | None = None
    """Of layers with a window, where they differ."""
    windows: tuple[int | None, ...]
    """Keys that a query of each layer sees, itself included; None: all."""
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        assert len(self.windows) == self.layers, "a window, or None, for each layer"

    @property
    def parameters(self) -> int:
        """Numbers in all weights together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight the model declares: Hugging Face's name → shape.

        Weights whose products share an input follow one another: laid out in this order, they
        are one weight.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.{name}": shape for name, shape in (self._attention() | self._mlp()).items()}
        return shapes

    def _attention(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (q, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, q),
            "post_attention_layernorm.weight": (self.hidden,),
        }
        if self.qkv_bias:
            shapes |= {f"self_attn.{part}_proj.bias": (size,) for part, size in (("q", q), ("k", kv), ("v", kv))}
        if self.output_bias:
            shapes["self_attn.o_proj.bias"] = (self.hidden,)
        if self.architecture.qk_norm:
            shapes |= {f"self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
        return shapes

    def _mlp(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }
        if self.mlp_bias:
            shapes |= {f"mlp.{part}_proj.bias": (self.intermediate,) for part in ("gate", "up")}
            shapes["mlp.down_proj.bias"] = (self.hidden,)
        if self.architecture.sandwich_norms:
            shapes |= {f"{side}_feedforward_layernorm.weight": (self.hidden,) for side in ("pre", "post")}
        return shapes

    def to_json(self) -> str:
        """As text, for a file of converted weights."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["architecture"] = self.architecture.model_type
        fields |= {name: _rope_to_json(fields[name]) for name in ("rope", "local_rope")}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The inverse. Raises ValueError, TypeError or KeyError for any other text."""
        fields: dict[str, Any] = json.loads(text)
        fields["architecture"] = ARCHITECTURES[fields["architecture"]]
        fields["windows"] = tuple(fields["windows"])
        fields |= {name: _rope_from_json(fields[name]) for name in ("rope", "local_rope")}
        return cls(**fields)


def _rope_to_json(rope: Rope | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    scaling = rope.scaling and {"kind": type(rope.scaling).__name__, **dataclasses.asdict(rope.scaling)}
    return {"theta": rope.theta, "scaling": scaling}


def _rope_from_json(fields: dict[str, Any] | None) -> Rope | None:
    if fields is None:
        return None
    if fields["scaling"] is None:
        return Rope(theta=fields["theta"])
    values: dict[str, Any] = dict(fields["scaling"])
    scaling = SCALINGS[values.pop("kind")]
    if scaling is Divided:
        values["divisors"] = tuple(values["divisors"])
    return Rope(theta=fields["theta"], scaling=scaling(**values))
