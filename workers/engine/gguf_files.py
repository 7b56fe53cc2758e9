"""The tensors of a GGUF file: their names, types and numbers. Knows llama.cpp's ways, no layer's maths.

llama.cpp stores some weights otherwise than their authors: the rows of Llama's Q and K in the
order its rotary kernel wants, and the norms of Gemma with the 1 added that their maths adds.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from kernels.cpu.panels import RowFormat, Rows
from workers.engine.architectures import Architecture
from workers.engine.gguf_config import from_gguf
from workers.engine.model_config import ModelConfig, UnsupportedModel
from workers.engine.stored_tensors import StoredTensor

TYPES = tuple(
    gguf.GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
_BLOCKS: dict[gguf.GGMLQuantizationType, RowFormat] = {
    gguf.GGMLQuantizationType.Q8_0: "Q8_0",
    gguf.GGMLQuantizationType.Q4_1: "Q4_1",
    gguf.GGMLQuantizationType.Q4_0: "Q4_0",
}
_ROPE_DIVISORS = "rope_freqs.weight"
_PIECE = 1 << 24
"""Numbers dequantised at a time: 64 MiB in fp32, whatever the size of the tensor."""

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufModel:
    """An open file: its configuration, and tensors that nobody has read yet."""

    def __init__(self, path: Path) -> None:
        """Raises UnsupportedModel naming the file and what is wrong in it."""
        self._path = path
        reader = _opened(path)
        for tensor in reader.tensors:
            if tensor.tensor_type not in TYPES:
                raise UnsupportedModel(
                    f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}; what works: "
                    f"{', '.join(kind.name for kind in TYPES)}"
                )
        metadata = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")
        }
        if words := reader.fields.get("tokenizer.ggml.tokens"):
            metadata["tokenizer.ggml.tokens"] = words.data  # one entry a word: only their number counts here
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        divisors = self._tensors.pop(_ROPE_DIVISORS, None)
        self.config: ModelConfig = from_gguf(
            metadata,
            self._tensors.keys(),
            str(path),
            divisors=None if divisors is None else tuple(dequantize(divisors.data, divisors.tensor_type).tolist()),
        )
        if divisors is not None and divisors.n_elements != self.config.head_dim // 2:
            raise UnsupportedModel(
                f"{path}: tensor {_ROPE_DIVISORS} is [{divisors.n_elements}], "
                f"heads of {self.config.head_dim} need [{self.config.head_dim // 2}]"
            )

    def stored(self) -> dict[str, StoredTensor]:
        """By Hugging Face's name."""
        kind = self.config.architecture
        return {_name(label, kind, self._path): self._stored(tensor) for label, tensor in self._tensors.items()}

    def quantised(self) -> dict[str, Rows]:
        """Tensors whose blocks of 32 can be multiplied as they are, by Hugging Face's name."""
        kind = self.config.architecture
        rows: dict[str, Rows] = {}
        for label, tensor in self._tensors.items():
            form = _BLOCKS.get(tensor.tensor_type)
            if form and tensor.data.ndim == 2:
                data = tensor.data
                if _is_paired(label, kind):
                    data = np.ascontiguousarray(_halved(torch.from_numpy(data.copy()), self.config.head_dim).numpy())  # pyright: ignore[reportUnknownMemberType]
                rows[_name(label, kind, self._path)] = Rows(form, data)
        return rows

    def _stored(self, tensor: gguf.ReaderTensor) -> StoredTensor:
        return StoredTensor(
            file=self._path,
            label=tensor.name,
            shape=tuple(int(size) for size in reversed(tensor.shape.tolist())),
            mapped=None,
            copy_to=partial(_convert, tensor, self.config),
        )


def _opened(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise UnsupportedModel(f"{path}: no such file")
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise UnsupportedModel(
            f"{path}: not a whole GGUF file ({error}); it has {path.stat().st_size} bytes: fetch it again"
        ) from error


def _name(label: str, kind: Architecture, path: Path) -> str:
    if label in _NAMES:
        return _NAMES[label]
    names = _LAYER_NAMES | _SANDWICH_NAMES if kind.sandwich_norms else _LAYER_NAMES
    match = _LAYER.fullmatch(label)
    if match is None or match[2] not in names:
        raise UnsupportedModel(f"{path}: tensor {label} is not part of a {kind.model_type} model")
    return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"


def _convert(tensor: gguf.ReaderTensor, config: ModelConfig, to: Tensor) -> None:
    """A piece at a time, in whole rows (of Q and K: whole heads)."""
    kind = config.architecture
    paired = _is_paired(tensor.name, kind)
    unit = config.head_dim if paired else 1
    data: Any = tensor.data
    rows = to.shape[0]
    step = max(1, _PIECE * rows // max(1, to.numel()) // unit) * unit
    for first in range(0, rows, step):
        # Quantised vectors are rows of blocks: cut only what has rows.
        part = data if data.ndim == 1 else data[first : first + step]
        numbers = np.require(dequantize(part, tensor.tensor_type), np.float32, "W")
        values = torch.from_numpy(numbers).view(-1, *to.shape[1:])  # pyright: ignore[reportUnknownMemberType]
        if paired:
            values = _halved(values, config.head_dim)
        if kind.plus_one_norms and tensor.name.endswith("norm.weight"):
            values = values - 1
        to[first : first + len(values)] = values
        if data.ndim == 1:
            return


def _is_paired(label: str, kind: Architecture) -> bool:
    return kind.interleaved_gguf and (".attn_q." in label or ".attn_k." in label)


def _halved(rows: Tensor, head_dim: int) -> Tensor:
    """From pairs of rows that turn together, to heads whose first half turns with the second."""
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
