"""From a model's files to its forward pass: the fastest that this machine has. Knows no worker."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diptych.types import ModelDtype, ModelSource, WeightFormat
from kernels.cpu.library import NoLibrary, load_library
from workers.engine.batch import ForwardPass
from workers.engine.model import Model
from workers.engine.native_model import NativeModel, can_run
from workers.engine.packed_weights import NoRoom, PackedWeights, kept_file, pack_weights
from workers.engine.weights import Weights, load_weights

if TYPE_CHECKING:
    import torch


class Loaded(NamedTuple):
    """A model that can compute."""

    model: ForwardPass
    how: str
    """In words, for whoever wonders how fast or exact it is."""


def load_model(
    source: ModelSource,
    dtype: ModelDtype,
    form: WeightFormat,
    *,
    cache: Path | None,
    device: torch.device,
    threads: int,
) -> Loaded:
    """Raises what `load_weights` raises. `cache` is a folder for what later starts need not make again."""
    weights = load_weights(source, dtype, cache=cache)
    reason = _reason_against(weights, dtype, device)
    if not reason:
        try:
            return _native(weights, source, form, cache, threads)
        except (NoLibrary, NoRoom) as error:
            reason = str(error)
    model = Model(weights, max_context=weights.config.context, device=device)
    return Loaded(model, f"torch on {device.type}, {dtype} ({reason})")


def _reason_against(weights: Weights, dtype: ModelDtype, device: torch.device) -> str:
    """Why the C++ kernels won't do; empty if they may."""
    if device.type != "cpu":
        return "the C++ kernels are for CPUs"
    if dtype != "bf16":
        return "the C++ kernels are for bf16"
    return "" if can_run(weights.config) else "the C++ kernels want sizes in multiples of 32"


def _native(weights: Weights, source: ModelSource, form: WeightFormat, cache: Path | None, threads: int) -> Loaded:
    library = load_library(cache)
    # What is random is made as fast as it is read.
    keep = cache and not source.path.startswith("random:")
    packed = pack_weights(library, weights, form, kept_file(cache, source.digest, form) if cache and keep else None)
    model = NativeModel(library, weights, packed, max_context=weights.config.context, threads=threads)
    return Loaded(model, f"C++ kernels, {threads} thread(s), weights {_shares(packed)}")


def _shares(packed: PackedWeights) -> str:
    """As in "82 % q4, 18 % q8"."""
    numbers = Counter[str]()
    for panels in packed.values():
        numbers[panels.format] += panels.inputs * panels.columns
    return ", ".join(f"{count / numbers.total():.0%} {form}" for form, count in numbers.most_common())
