"""Writes a transformers folder as a GGUF file, the way llama.cpp's converter does: names, orders, metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
Quantise = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType | None]]


def as_f32(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType | None]:
    return values, None


def write_gguf(
    folder: Path,
    path: Path,
    *,
    quantise: Quantise = as_f32,
    metadata: dict[str, Any] | None = None,
    rename: dict[str, str | None] | None = None,
) -> Path:
    """`metadata` goes on top (keys after the architecture's name, None drops one); so does `rename` for tensors."""
    config = json.loads((folder / "config.json").read_text())
    kind = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, kind)
    for key, value in (_metadata(config, kind) | (metadata or {})).items():
        if value is not None:
            _add(writer, key if key.startswith("tokenizer.") else f"{kind}.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config["num_hidden_layers"])
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    if kind != "llama":
        tensors = {
            name: values + (name.endswith("norm.weight") and "gemma" in kind) for name, values in tensors.items()
        }
    if (rope := _rope_divisors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", rope)
    for name, values in tensors.items():
        label = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert label is not None, name
        label = (rename or {}).get(label, label)
        if label is None:
            continue
        if kind == "llama" and ".attn_q." in label:
            values = permuted(values, config["num_attention_heads"])
        if kind == "llama" and ".attn_k." in label:
            values = permuted(values, config["num_key_value_heads"])
        data, quantised = quantise(label, np.ascontiguousarray(values, dtype=np.float32))
        writer.add_tensor(label, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to Llama's Q and K."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _metadata(config: dict[str, Any], kind: str) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(config["vocab_size"])],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.get("head_dim"):
        values |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if "sliding_attention" in (config.get("layer_types") or ["sliding_attention"]) and config.get("sliding_window"):
        values["attention.sliding_window"] = config["sliding_window"]
    if kind.startswith("gemma"):
        values["attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            values |= {name: config[name]} if config[name] is not None else {}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return values


def _rope_divisors(config: dict[str, Any]) -> np.ndarray | None:
    """Llama 3's scaling, as a divisor for each pair."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return None
    size = config["head_dim"]
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    divisors: list[float] = []
    for pair in range(size // 2):
        length = 2 * math.pi * rope["rope_theta"] ** (2 * pair / size)
        share = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        blended = 1 / ((1 - share) / rope["factor"] + share)
        divisors.append(1.0 if length < high else rope["factor"] if length > low else blended)
    return np.array(divisors, dtype=np.float32)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
