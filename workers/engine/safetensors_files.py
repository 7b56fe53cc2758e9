"""The tensors of a folder of safetensors files, one or several. Knows names and types, no layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.engine.model_config import ModelConfig, UnsupportedModel
from workers.engine.stored_tensors import StoredTensor

INDEX = "model.safetensors.index.json"
_TYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_in_folder(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """By name. Reads the files' headers only; raises UnsupportedModel naming file and tensor."""
    shards = _shards(folder)
    stored: dict[str, StoredTensor] = {}
    for file in shards or _files(folder):
        for name, tensor in _stored(file, dtype):
            if _is_repeated(name, config):
                continue
            if name in stored:
                raise UnsupportedModel(f"{file}: tensor {name} is also in {stored[name].file}")
            stored[name] = tensor
    for name, file in ((name, file) for file, names in shards.items() for name in names):
        if name not in stored and not _is_repeated(name, config):
            raise UnsupportedModel(f"{file}: tensor {name} is missing, which {INDEX} says is there")
    return stored


def _is_repeated(name: str, config: ModelConfig) -> bool:
    """What some files hold though it follows from the rest."""
    return (name == "lm_head.weight" and config.tied) or name.endswith("rotary_emb.inv_freq")


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The files that an index names, and the tensors it says are in each."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        names: dict[str, str] = json.loads(path.read_text())["weight_map"]
        shards: dict[Path, list[str]] = {}
        for name, file in names.items():
            shards.setdefault(folder / file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{path}: not a readable index of shards: {error!r}") from error
    if missing := sorted(file for file in shards if not file.is_file()):
        raise UnsupportedModel(
            f"{missing[0]}: missing, one of {len(missing)} of {len(shards)} shards that {INDEX} names; fetch the rest"
        )
    return shards


def _files(folder: Path) -> list[Path]:
    """Without an index: the usual name, or else every file there is."""
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(f"{folder}: no *.safetensors file; weights of another format must be converted first")
    return files


def _stored(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, StoredTensor]]:
    try:
        opened: Any = safe_open(file, framework="pt")  # pyright: ignore[reportUnknownVariableType]
    except (OSError, SafetensorError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise UnsupportedModel(
            f"{file}: not a whole safetensors file ({error}); it has {size} bytes: fetch it again"
        ) from error
    for name in opened.keys():  # noqa: SIM118 (not a dict)
        header = opened.get_slice(name)
        kind = header.get_dtype()
        if kind not in _TYPES:
            raise UnsupportedModel(
                f"{file}: tensor {name} is {kind}, which is quantised or no weight; what works: {', '.join(_TYPES)}"
            )
        read = partial(opened.get_tensor, name)
        mapped = read if _TYPES[kind] == dtype else None
        yield (
            name,
            StoredTensor(
                file=file, label=name, shape=tuple(header.get_shape()), mapped=mapped, copy_to=partial(_copy, read)
            ),
        )


def _copy(read: partial[Tensor], to: Tensor) -> None:
    to.copy_(read())
