"""A model's weights, checked against what it declares. Knows sources, not layers' maths.

Sources: a GGUF file (dequantised), a folder of safetensors, or seeded random numbers. Nothing is
read before names, shapes and the room in memory are known to be right, and nothing is held twice:
weights that a step multiplies together lie together from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diptych.types import ModelDtype, ModelSource
from kernels.cpu.panels import Rows
from workers.engine.config_json import from_folder
from workers.engine.conversion import Conversion
from workers.engine.kv_memory import TORCH_DTYPE
from workers.engine.layout import is_stacked, laid_out
from workers.engine.model_config import ModelConfig, UnsupportedModel
from workers.engine.model_memory import available_bytes, check_room
from workers.engine.random_weights import fill_randomly, random_shape
from workers.engine.safetensors_files import stored_in_folder
from workers.engine.stored_tensors import StoredTensor, check_declared

__all__ = ["TORCH_DTYPE", "ModelConfig", "UnsupportedModel", "Weights", "load_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A configuration and every tensor it declares, by Hugging Face's names. Not to be written to:
    some are a file's own pages."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    quantised: Callable[[], dict[str, Rows]] = dict[str, "Rows"]
    """The file's own numbers of those tensors that it has in few bits and that can be used so."""


def load_weights(
    source: ModelSource, dtype: ModelDtype, *, cache: Path | None, room_bytes: int | None = None
) -> Weights:
    """Raises UnsupportedModel naming the file and the tensor or field that is wrong, ModelTooLarge
    when the weights need more than `room_bytes` (None: what this machine has available)."""
    room = available_bytes(torch.device("cpu")) if room_bytes is None else room_bytes
    if source.path.startswith("random:"):
        return _random(source, TORCH_DTYPE[dtype], room)
    path = Path(source.path)
    if path.is_dir():
        return _folder(path, TORCH_DTYPE[dtype], room)
    return _gguf(path, source.digest, dtype, cache, room)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of these rows, in this order; without a copy where they lie so already."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        end += part.nbytes
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _random(source: ModelSource, dtype: torch.dtype, room: int) -> Weights:
    config = random_shape(source.path)
    check_room(config, dtype, room, source=source.path)
    tensors = laid_out(config.shapes, dtype)
    fill_randomly(tensors, config, source.digest)
    return Weights(config=config, tensors=tensors)


def _folder(path: Path, dtype: torch.dtype, room: int) -> Weights:
    config = from_folder(path)
    stored = stored_in_folder(path, config, dtype)
    check_declared(config, stored, path)
    check_room(config, dtype, room, source=str(path))
    # What can be used as it lies stays in the file: processes on this machine share its pages.
    copied = {name: shape for name, shape in config.shapes.items() if stored[name].mapped is None or is_stacked(name)}
    tensors = laid_out(copied, dtype)
    _fill(tensors.items(), stored)
    return Weights(
        config=config,
        tensors={name: tensors[name] if name in tensors else _map(stored[name]) for name in config.shapes},
    )


def _map(stored: StoredTensor) -> Tensor:
    assert stored.mapped is not None
    return stored.mapped()


def _fill(tensors: Iterable[tuple[str, Tensor]], stored: dict[str, StoredTensor]) -> None:
    for name, tensor in tensors:
        stored[name].copy_to(tensor)


def _gguf(path: Path, digest: str, dtype: ModelDtype, cache: Path | None, room: int) -> Weights:
    from workers.engine.gguf_files import GgufModel  # its package isn't on every machine with a GPU

    conversion = Conversion(cache, digest, dtype, TORCH_DTYPE[dtype]) if cache else None
    if conversion and (kept := conversion.load()):
        return Weights(config=kept[0], tensors=kept[1], quantised=lambda: GgufModel(path).quantised())
    model = GgufModel(path)
    config, stored = model.config, model.stored()
    check_declared(config, stored, path)
    check_room(config, TORCH_DTYPE[dtype], room, source=str(path))
    if conversion and (tensors := conversion.keep(config, lambda tensors: _fill(tensors.items(), stored))):
        return Weights(config=config, tensors=tensors, quantised=model.quantised)
    tensors = laid_out(config.shapes, TORCH_DTYPE[dtype])
    _fill(tensors.items(), stored)
    return Weights(config=config, tensors=tensors, quantised=model.quantised)
