"""How far a pair of a head's numbers turns at each position. Knows no layer and no weight.

Every table is a function of the position alone, so that a key has the same bits whatever it was
computed with. That decides the one scaling that transformers computes from the length of the
input: dynamic. Here a position past the original length turns as if it were the last one, which
is what transformers does when it is fed token by token, and not what it does when a longer prompt
comes in one piece (there, all earlier keys turn by the length of the whole).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

import kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """All positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """From the `original` length on, the base grows with the position (NTK-aware)."""

    factor: float
    original: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3:
    """Slow turns are divided by `factor`, fast ones left, those between blended."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Turns that complete less than `beta_slow` rounds in the `original` length are divided by
    `factor`, more than `beta_fast` left, those between blended (Peng et al. 2023)."""

    factor: float
    original: int
    attention_factor: float
    """Cosines and sines are multiplied by it."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """Each pair's turn is divided by its own number, as GGUF files say it."""

    divisors: tuple[float, ...]


Scaling: TypeAlias = Linear | Dynamic | Llama3 | Yarn | Divided
SCALINGS: dict[str, type[Scaling]] = {each.__name__: each for each in (Linear, Dynamic, Llama3, Yarn, Divided)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions (RoFormer, Su 2021) of some layers."""

    theta: float
    scaling: Scaling | None = None


def rope_table(rope: Rope, positions: int, head_dim: int) -> Tensor:
    """Cosines and sines: [positions, 2, head_dim] in fp32."""
    plain = kernels.rope_frequencies(head_dim, rope.theta)
    match rope.scaling:
        case None:
            return kernels.turn_table(plain, positions)
        case Linear(factor=factor):
            return kernels.turn_table(plain / factor, positions)
        case Divided(divisors=divisors):
            return kernels.turn_table(plain / torch.tensor(divisors, dtype=torch.float32), positions)
        case Dynamic() as dynamic:
            return kernels.turn_table(_dynamic(dynamic, rope.theta, positions, head_dim), positions)
        case Llama3() as llama3:
            return kernels.turn_table(_llama3(llama3, plain), positions)
        case Yarn() as yarn:
            return kernels.turn_table(_yarn(yarn, rope.theta, head_dim), positions, yarn.attention_factor)
        case _:
            assert_never(rope.scaling)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """The one that YaRN's authors give for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _dynamic(scaling: Dynamic, theta: float, positions: int, head_dim: int) -> Tensor:
    lengths = torch.arange(1, positions + 1).clamp_min(scaling.original).float()
    stretch = scaling.factor * lengths / scaling.original - (scaling.factor - 1)
    bases = theta * stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / bases[:, None] ** exponents


def _llama3(scaling: Llama3, plain: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = (scaling.original / wavelengths - low) / (high - low)
    blended = (1 - blend) * plain / scaling.factor + blend * plain
    slow = wavelengths > scaling.original / low
    fast = wavelengths < scaling.original / high
    return torch.where(slow, plain / scaling.factor, torch.where(fast, plain, blended))


def _yarn(scaling: Yarn, theta: float, head_dim: int) -> Tensor:
    bases = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)

    def pair_of(rounds: float) -> float:
        """The pair, as a fraction, that makes so many rounds in the original length."""
        return head_dim * math.log(scaling.original / (rounds * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * bases) * (1 - kept) + 1.0 / bases * kept
