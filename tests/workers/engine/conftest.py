"""A model over paged memory, fed by hand: every token's logits, in whatever pieces."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import kernels
from diptych.types import ModelSource, WeightFormat
from kernels.cpu.library import NoLibrary, load_library
from kernels.cpu.products import Activations
from workers.engine.batch import Batch, ForwardPass
from workers.engine.model import Model
from workers.engine.native_model import NativeModel
from workers.engine.packed_weights import pack_weights
from workers.engine.weights import Weights, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 16
CPU = torch.device("cpu")


@dataclass(eq=False)
class Fed:
    """A sequence: its tokens so far and the blocks its KV is in."""

    blocks: torch.Tensor
    tokens: list[int] = field(default_factory=list)


class Paged:
    """A model and an arena whose blocks are dealt out in no order."""

    def __init__(
        self,
        weights: Weights,
        *,
        model: ForwardPass | None = None,
        context: int = 1024,
        sequences: int = 4,
        kv: torch.dtype | None = None,
    ) -> None:
        """`kv`: the cache's numbers; None for the weights'."""
        self.model = model or Model(weights, max_context=context, device=CPU)
        config = weights.config
        count = context // BLOCK
        shape = (count * sequences, config.layers, 2, config.kv_heads, BLOCK, config.head_dim)
        self.arena = torch.zeros(shape, dtype=kv or weights.tensors["model.norm.weight"].dtype)
        order = torch.randperm(count * sequences, generator=torch.Generator().manual_seed(7))
        self._free = list(order.split(count))

    def sequence(self) -> Fed:
        return Fed(self._free.pop())

    def step(self, decodes: list[tuple[Fed, int]], chunks: list[tuple[Fed, list[int]]]) -> torch.Tensor:
        """One forward pass over single tokens and pieces of prompts: the logits of every row."""
        return self.said(decodes, chunks).values

    def said(self, decodes: list[tuple[Fed, int]], chunks: list[tuple[Fed, list[int]]]) -> kernels.Logits:
        """As `step`, and what is known of the logits."""
        decodes = sorted(decodes, key=lambda each: -len(each[0].tokens))
        tokens, segments = list[int](), list[kernels.Segment]()
        for sequence, new in [*((each, [token]) for each, token in decodes), *chunks]:
            segments.append(kernels.Segment(len(sequence.tokens), len(new), sequence.blocks.tolist()))
            tokens += new
            sequence.tokens += new
        wanted = range(len(tokens))
        batch = Batch(tokens=tokens, segments=segments, decode_rows=len(decodes), wanted=wanted)
        return self.model.forward(batch, self.arena)

    def feed(self, tokens: list[int], pieces: list[int]) -> torch.Tensor:
        """Logits of every token: chunks of these sizes first, then one token at a time."""
        sequence, rest = self.sequence(), tokens
        logits: list[torch.Tensor] = []
        for size in pieces:
            logits.append(self.step([], [(sequence, rest[:size])]))
            rest = rest[size:]
        logits += [self.step([(sequence, token)], []) for token in rest]
        self._free.append(sequence.blocks)
        return torch.cat(logits)


@pytest.fixture
def paged() -> type[Paged]:
    return Paged


@pytest.fixture
def load() -> Callable[..., Weights]:
    """Weights of a path, in fp32 and without a cache unless asked otherwise."""

    def weights(path: Path | str, *, dtype: Any = "fp32", cache: Path | None = None, **more: Any) -> Weights:
        source = ModelSource(name="m", path=str(path), digest="0123456789abcdef" * 4)
        return load_weights(source, dtype, cache=cache, **more)

    return weights


@pytest.fixture
def peer(tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """A tiny model of transformers with seeded random weights, every one of which matters; saved in `tmp_path`."""

    def build(config: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                values = torch.randn(weight.shape, generator=generator)
                if "norm" in name:
                    weight.copy_(values * 0.2 + (0 if "gemma" in config.model_type else 1))
                else:
                    weight.copy_(values * (0.3 if weight.dim() == 1 else 1.3 * weight.shape[-1] ** -0.5))
        model.save_pretrained(tmp_path)
        return model

    return build


@pytest.fixture
def edit_config(tmp_path: Path) -> Callable[..., None]:
    """Change fields of the saved config.json; those given as `...` go."""

    def edit(**changes: Any) -> None:
        path = tmp_path / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return edit


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        return load_library(tmp_path_factory.mktemp("native"))
    except NoLibrary as error:
        pytest.skip(f"no C++ kernels here: {error}")


@pytest.fixture
def native(library: ctypes.CDLL) -> Callable[..., NativeModel]:
    """Of these weights, on two threads."""

    def build(
        weights: Weights, form: WeightFormat = "auto", kept: Path | None = None, activations: Activations = "bf16"
    ) -> NativeModel:
        packed = pack_weights(library, weights, form, kept)
        return NativeModel(library, weights, packed, max_context=1024, threads=2, activations=activations)

    return build
