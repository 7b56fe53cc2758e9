"""A model's weights, checked against what it declares. Knows files and names, not layers' maths.

Sources: a GGUF file (dequantised), a folder of safetensors, or seeded random numbers. What was
dequantised once is kept beside the cache's other files, named by the model's digest, and mapped
by later starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.types import ModelDtype, ModelSource
from workers.engine.model_config import ModelConfig, UnsupportedModel, from_folder, from_gguf, random_shape

TORCH_DTYPE: dict[ModelDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A configuration and every tensor it declares, by Hugging Face's names."""

    config: ModelConfig
    tensors: dict[str, Tensor]


def load_weights(source: ModelSource, dtype: ModelDtype, *, cache: Path | None) -> Weights:
    """Raises UnsupportedModel naming the file and the tensor or field that is wrong."""
    if source.path.startswith("random:"):
        config = random_shape(source.path)
        return Weights(config=config, tensors=_random(config, source.digest, TORCH_DTYPE[dtype]))
    path = Path(source.path)
    if path.is_dir():
        config = from_folder(path)
        return Weights(config=config, tensors=_checked(config, _folder(path, TORCH_DTYPE[dtype]), path))
    kept = cache / f"{source.digest}.{dtype}.safetensors" if cache else None
    if kept and (weights := _mapped(kept)):
        return weights
    weights = _gguf(path, TORCH_DTYPE[dtype])
    if kept:
        _keep(weights, kept)
    return weights


def _checked(config: ModelConfig, found: Iterator[tuple[str, Tensor]], path: Path) -> dict[str, Tensor]:
    declared, tensors = config.shapes, dict[str, Tensor]()
    for name, tensor in found:
        if name == "lm_head.weight" and config.tied:
            continue  # some files repeat the tied head
        if name not in declared:
            raise UnsupportedModel(f"{path}: tensor {name} is not part of this architecture")
        if tuple(tensor.shape) != declared[name]:
            raise UnsupportedModel(f"{path}: {name} is {tuple(tensor.shape)}, config says {declared[name]}")
        tensors[name] = tensor
    if missing := sorted(declared.keys() - tensors.keys()):
        raise UnsupportedModel(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return tensors


def _random(config: ModelConfig, digest: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Seeded by the digest: every worker of a cluster draws the same numbers."""
    generator = torch.Generator().manual_seed(int(digest[:15], 16))
    tensors: dict[str, Tensor] = {}
    for name, shape in config.shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
    return tensors


def _folder(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(f"{folder}: no *.safetensors file")
    for file in files:
        with safe_open(file, framework="pt") as tensors:  # pyright: ignore[reportUnknownVariableType]
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith("rotary_emb.inv_freq"):
                    yield name, tensors.get_tensor(name).to(dtype)


def _gguf(path: Path, dtype: torch.dtype) -> Weights:
    import gguf
    from gguf.quants import dequantize

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: not a readable GGUF file: {error}") from error
    fields: dict[str, Any] = {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")
    }
    fields["tokenizer.ggml.tokens"] = reader.fields["tokenizer.ggml.tokens"].data
    config = from_gguf(fields, {tensor.name for tensor in reader.tensors}, str(path))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for tensor in reader.tensors:
            name = _from_gguf_name(tensor.name, path)
            values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # a copy: the file is read-only
            yield name, _unpermuted(name, values, config).to(dtype).contiguous()

    return Weights(config=config, tensors=_checked(config, tensors(), path))


def _from_gguf_name(name: str, path: Path) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, _, rest = name.partition("blk.")
    layer, _, kind = rest.partition(".")
    if kind not in _GGUF_LAYER_NAMES:
        raise UnsupportedModel(f"{path}: tensor {name} is not part of this architecture")
    return f"model.layers.{layer}.{_GGUF_LAYER_NAMES[kind]}"


def _unpermuted(name: str, values: Tensor, config: ModelConfig) -> Tensor:
    """llama.cpp stores the rows of Q and K interleaved for its rotary kernel; ours takes halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    heads = config.heads if name.endswith("q_proj.weight") else config.kv_heads
    return values.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(values.shape)


def _mapped(path: Path) -> Weights | None:
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
        config = ModelConfig(**json.loads(file.metadata()["config"]))
    return Weights(config=config, tensors=load_file(path))


def _keep(weights: Weights, path: Path) -> None:
    """Best effort: a full or read-only disk costs the next start some seconds, nothing else."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    fields = {name: getattr(weights.config, name) for name in ModelConfig.__dataclass_fields__}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights.tensors, part, metadata={"config": json.dumps(fields)})
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
