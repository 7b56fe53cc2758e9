"""From a model's files to its forward pass: the fastest that this machine has. Knows no worker."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from diptych.types import Activations, AttentionKernels, GpuKernels, ModelDtype, ModelSource, WeightFormat
from kernels.cpu.library import NoLibrary, load_library
from kernels.gpu import flashinfer_attention
from kernels.gpu.availability import reason_against
from kernels.gpu.paged import Look
from workers.engine.activations import chosen, kept_pace
from workers.engine.attention_choice import Candidate, Choice, chosen_attention
from workers.engine.attention_trial import Shape
from workers.engine.batch import ForwardPass
from workers.engine.model import Model
from workers.engine.model_config import UnsupportedModel
from workers.engine.native_model import NativeModel, can_run
from workers.engine.packed_weights import NoRoom, PackedWeights, kept_file, pack_weights
from workers.engine.weights import Weights, load_weights

_FP8_CAPABILITY = (9, 0)
"""What products by rows' scales need (`kernels.gpu.low_bits`)."""
_FP8_KV_CAPABILITY = (8, 9)
"""Below it Triton knows no e4m3."""


class Loaded(NamedTuple):
    """A model that can compute."""

    model: ForwardPass
    how: str
    """In words, for whoever wonders how fast or exact it is."""


class GpuChoice(NamedTuple):
    """What is asked of a GPU."""

    kernels: GpuKernels = "auto"
    graphs: bool = True
    attention: AttentionKernels = "auto"
    block_size: int = 16
    fp8_kv: bool = False
    """The cache is in fp8."""


def load_model(
    source: ModelSource,
    dtype: ModelDtype,
    form: WeightFormat,
    *,
    cache: Path | None,
    device: torch.device,
    threads: int,
    activations: Activations = "bf16",
    on_gpu: GpuChoice = GpuChoice(),  # noqa: B008  (immutable)
) -> Loaded:
    """Raises what `load_weights` raises, and UnsupportedModel for what this device doesn't have. `cache` is a
    folder for what later starts need not make again."""
    _refuse_impossible(dtype, form, device, on_gpu)
    if activations == "int8" and dtype == "bf16" and device.type == "cuda":
        raise UnsupportedModel("activations = int8 is for CPUs: a GPU with engine.weights = int8 rounds them itself")
    weights = load_weights(source, dtype, cache=cache)
    reason = _reason_against_triton(dtype, device, on_gpu) if device.type == "cuda" else _reason_against(weights, dtype)
    if not reason:
        if device.type == "cuda":
            return _triton(weights, form, device, on_gpu)
        try:
            return _native(weights, source, form, activations, cache, threads)
        except (NoLibrary, NoRoom) as error:
            reason = str(error)
    if dtype == "bf16" and device.type != "cuda":
        if activations == "int8":
            raise UnsupportedModel(f"activations = int8: {reason}; set it to auto or bf16")
        if form in ("int8", "int4"):
            raise UnsupportedModel(f"engine.weights = {form}: {reason}; set it to auto or bf16")
    model = Model(weights, max_context=weights.config.context, device=device)
    return Loaded(model, f"torch on {device.type}, {dtype} ({reason})")


def _refuse_impossible(dtype: ModelDtype, form: WeightFormat, device: torch.device, on_gpu: GpuChoice) -> None:
    """What was asked for by name is had or refused; only `auto` makes do."""
    if form == "fp8" and device.type != "cuda":
        raise UnsupportedModel("engine.weights = fp8 needs a CUDA GPU: int8 works on both")
    if device.type != "cuda":
        if on_gpu.attention == "flashinfer":
            raise UnsupportedModel("engine.attention = flashinfer needs a CUDA GPU: set it to auto")
        return
    if form == "int4":
        raise UnsupportedModel("engine.weights = int4 is for CPUs: a GPU knows bf16, int8 and fp8")
    reason = _reason_against_triton(dtype, device, on_gpu)
    if reason and on_gpu.kernels == "triton":
        raise UnsupportedModel(f"engine.kernels = triton: {reason}")
    if reason and on_gpu.attention == "flashinfer":
        raise UnsupportedModel(f"engine.attention = flashinfer goes with Triton's kernels: {reason}; set it to auto")
    if reason and form in ("int8", "fp8") and dtype == "bf16":
        raise UnsupportedModel(f"engine.weights = {form} on a GPU: {reason}")
    if form == "fp8" and not reason and (able := torch.cuda.get_device_capability(device)) < _FP8_CAPABILITY:
        raise UnsupportedModel(
            f"engine.weights = fp8 needs compute capability {_dotted(_FP8_CAPABILITY)}, this GPU has {_dotted(able)}: "
            "int8 works"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _reason_against(weights: Weights, dtype: ModelDtype) -> str:
    """Why the C++ kernels won't do; empty if they may."""
    if dtype != "bf16":
        return "the C++ kernels are for bf16"
    return "" if can_run(weights.config) else "the C++ kernels want sizes in multiples of 32"


def _reason_against_triton(dtype: ModelDtype, device: torch.device, on_gpu: GpuChoice) -> str:
    """Why the Triton kernels won't do; empty if they will."""
    if on_gpu.kernels == "reference":
        return "engine.kernels = reference"
    if dtype != "bf16":
        return "the Triton kernels are for bf16"
    reason = reason_against(device)
    if on_gpu.fp8_kv and not reason and (able := torch.cuda.get_device_capability(device)) < _FP8_KV_CAPABILITY:
        return (
            f"Triton reads fp8 from compute capability {_dotted(_FP8_KV_CAPABILITY)} on, this GPU has {_dotted(able)}"
        )
    return reason


def _triton(weights: Weights, form: WeightFormat, device: torch.device, on_gpu: GpuChoice) -> Loaded:
    from workers.engine.triton_model import TritonModel  # needs Triton

    bits = form if form in ("int8", "fp8") else None
    attention = _attention(weights, device, on_gpu)
    model = TritonModel(
        weights,
        max_context=weights.config.context,
        device=device,
        bits=bits,
        graphs=on_gpu.graphs,
        attention=attention.attention,
    )
    graphs = "CUDA graphs" if on_gpu.graphs else "no CUDA graphs"
    return Loaded(model, f"Triton kernels on {device}, {graphs}, weights {bits or 'bf16'}{attention.how}")


def _attention(weights: Weights, device: torch.device, on_gpu: GpuChoice) -> Choice:
    from kernels.gpu.triton_attention import triton_attention  # needs Triton

    config, dtype = weights.config, weights.tensors["model.norm.weight"].dtype
    looks = tuple(Look(config.attention_scale, window, config.attention_soft_cap) for window in config.windows)
    shape = Shape(config.heads, config.kv_heads, config.head_dim, on_gpu.block_size, dtype, looks)
    in_cache = torch.float8_e4m3fn if on_gpu.fp8_kv else dtype
    candidate = Candidate(
        flashinfer_attention.reason_against(config.head_dim, in_cache, device),
        partial(flashinfer_attention.flashinfer_attention, config.heads // config.kv_heads, config.head_dim, device),
    )
    found = chosen_attention(on_gpu.attention, triton_attention(device), candidate, shape, device, graphs=on_gpu.graphs)
    # What was tried with goes back: what is free is measured for KV.
    torch.cuda.empty_cache()
    return found


def _native(
    weights: Weights,
    source: ModelSource,
    form: WeightFormat,
    activations: Activations,
    cache: Path | None,
    threads: int,
) -> Loaded:
    library = load_library(cache)
    # What is random is made as fast as it is read.
    keep = None if source.path.startswith("random:") else cache
    packed = pack_weights(library, weights, form, kept_file(keep, source.digest, form) if keep else None)
    choice = chosen(library, packed, activations, kept_pace(keep, library, source.digest, form) if keep else None)
    model = NativeModel(
        library,
        weights,
        packed,
        max_context=weights.config.context,
        threads=threads,
        activations=choice.activations,
    )
    return Loaded(model, f"C++ kernels, {threads} thread(s), weights {_shares(packed)}{choice.how}")


def _shares(packed: PackedWeights) -> str:
    """As in "82 % q4, 18 % q8"."""
    numbers = Counter[str]()
    for panels in packed.values():
        numbers[panels.format] += panels.inputs * panels.columns
    return ", ".join(f"{count / numbers.total():.0%} {form}" for form, count in numbers.most_common())
