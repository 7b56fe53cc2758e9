"""What is asked for by name is had or refused, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diptych.types import ModelSource
from workers.engine.loading import GpuChoice, load_model
from workers.engine.model_config import UnsupportedModel

TINY = ModelSource(name="random:tiny", path="random:tiny", digest="0123456789abcdef")


def load(
    device: str,
    dtype: Any = "bf16",
    form: Any = "auto",
    kernels: Any = "auto",
    activations: Any = "bf16",
    attention: Any = "auto",
    *,
    fp8_kv: bool = False,
) -> Any:
    return load_model(
        TINY,
        dtype,
        form,
        cache=None,
        device=torch.device(device),
        threads=1,
        activations=activations,
        on_gpu=GpuChoice(kernels, attention=attention, fp8_kv=fp8_kv),
    )


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"device": "cpu", "form": "fp8"}, "fp8 needs a CUDA GPU"),
        ({"device": "cuda", "form": "int4"}, "int4 is for CPUs"),
        ({"device": "cuda", "dtype": "fp32", "kernels": "triton"}, "the Triton kernels are for bf16"),
        ({"device": "cuda", "form": "int8", "kernels": "reference"}, "engine.kernels = reference"),
        ({"device": "cuda", "form": "fp8"}, "Triton is not installed"),
        ({"device": "cuda", "kernels": "triton"}, "Triton is not installed"),
        ({"device": "cuda", "activations": "int8"}, "int8 is for CPUs"),
        ({"device": "cpu", "attention": "flashinfer"}, "flashinfer needs a CUDA GPU: set it to auto"),
        ({"device": "cuda", "attention": "flashinfer"}, "Triton is not installed; set it to auto"),
        ({"device": "cuda", "dtype": "fp32", "attention": "flashinfer"}, "goes with Triton's kernels: .* for bf16"),
    ],
    ids=str,
)
def test_what_this_device_lacks_is_refused(asked: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.loading.reason_against", lambda _: "Triton is not installed")
    with pytest.raises(UnsupportedModel, match=reason):
        load(**asked)


def test_fp8_wants_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.loading.reason_against", lambda _: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UnsupportedModel, match=r"fp8 needs compute capability 9\.0, this GPU has 8\.0: int8 works"):
        load("cuda", form="fp8")


def test_kv_in_fp8_wants_a_gpu_whose_kernels_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.loading.reason_against", lambda _: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    told = r"Triton reads fp8 from compute capability 8\.9 on, this GPU has 8\.0"
    for asked in ({"kernels": "triton"}, {"form": "int8"}):
        with pytest.raises(UnsupportedModel, match=told):
            load("cuda", fp8_kv=True, **asked)


def test_a_cpu_says_what_it_computes_with() -> None:
    assert load("cpu", dtype="fp32").how == "torch on cpu, fp32 (the C++ kernels are for bf16)"
