"""Tensors as they lie in files, checked against what a model declares. Knows no file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workers.engine.model_config import ModelConfig, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor that nobody has read yet."""

    file: Path
    label: str
    """Its name in the file."""
    shape: tuple[int, ...]
    mapped: Callable[[], Tensor] | None
    """The file's own pages as a tensor, where they can be used as they are."""
    copy_to: Callable[[Tensor], None]
    """Its values into a tensor of the same shape, in that one's type."""


def check_declared(config: ModelConfig, stored: Mapping[str, StoredTensor], source: Path) -> None:
    """Raises UnsupportedModel for the first tensor that is missing, extra or of another shape."""
    declared, family = config.shapes, config.architecture.model_type
    for name, tensor in stored.items():
        if name not in declared:
            raise UnsupportedModel(
                f"{tensor.file}: tensor {tensor.label} {list(tensor.shape)} is not part of a {family} model with "
                f"{config.layers} layers{_reason(config, name)}"
            )
        if tensor.shape != declared[name]:
            raise UnsupportedModel(
                f"{tensor.file}: tensor {tensor.label} is {list(tensor.shape)}, the model's configuration says "
                f"{list(declared[name])}"
            )
    if missing := [name for name in declared if name not in stored]:
        raise UnsupportedModel(
            f"{source}: tensor {missing[0]} {list(declared[missing[0]])} is missing"
            + (f", and {len(missing) - 1} others" if missing[1:] else "")
            + "; the files are incomplete, or are another model's"
        )


def _reason(config: ModelConfig, name: str) -> str:
    if name.endswith(".bias"):
        return ", whose configuration has no such bias"
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return f" (0 to {config.layers - 1})" if layer.isdigit() and int(layer) >= config.layers else ""
