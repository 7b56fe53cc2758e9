"""Granules packed and unpacked on a GPU against `kernels.reference.granules`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

from kernels.gpu import granules as gpu
from kernels.reference import granules as reference
from kernels.reference.fp8 import FP8, moved
from kernels.reference.granules import Granules

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
cache_dtypes = [torch.float32, torch.bfloat16, FP8]
each_cache = pytest.mark.parametrize("dtype", cache_dtypes, ids=["fp32", "bf16", "fp8"])
each_heads = pytest.mark.parametrize("heads", [slice(0, 3), slice(1, 2)], ids=["all heads", "one of them"])
SHAPES = [(16, 32), (32, 32), (64, 80), (16, 128)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"blocks of {shape[0]}, {shape[1]} wide")


def arena_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    arena = torch.randn(6, 2, 2, 3, *shape, generator=torch.Generator().manual_seed(0))
    arena[4, 1, 0, :, 3] = 0.0  # a token of zeros
    return arena.to(dtype)


def chosen(shape: tuple[int, int]) -> Granules:
    return Granules(torch.tensor([4, 0, 5]), torch.tensor([0, shape[0] // 16 - 1, 0]))


def there(granules: Granules, device: torch.device) -> Granules:
    return Granules(*(each.to(device) for each in granules))


@each_cache
@each_heads
@each_shape
@pytest.mark.parametrize("wire", ["bf16", "fp32", "fp8"])
def test_plain_granules_are_the_same_bits(
    device: torch.device, wire: Any, shape: tuple[int, int], heads: slice, dtype: torch.dtype
) -> None:
    arena, granules = arena_of(shape, dtype), chosen(shape)
    arena[4, 0, 0, 1, 2, :2] = torch.tensor([1e4, -1e4]).to(dtype)  # in fp8 the largest
    wanted = reference.pack_granules(arena, granules, heads, wire)
    packed = gpu.pack_granules(arena.to(device), there(granules, device), heads, wire)
    assert torch.equal(packed.cpu(), wanted)
    target, found = torch.zeros_like(arena), torch.zeros_like(arena, device=device)
    reference.unpack_granules(target, granules, heads, wire, wanted)
    gpu.unpack_granules(found, there(granules, device), heads, wire, packed)
    assert torch.equal(moved(found).cpu(), moved(target))


@each_heads
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_cache_in_fp8_is_its_bytes_nan_included(device: torch.device, shape: tuple[int, int], heads: slice) -> None:
    random = torch.Generator().manual_seed(0)
    arena = torch.randint(0, 256, (6, 2, 2, 3, *shape), dtype=torch.uint8, generator=random).view(FP8)
    granules, target, found = chosen(shape), torch.zeros_like(arena), torch.zeros_like(arena, device=device)
    wanted = reference.pack_granules(arena, granules, heads, "fp8")
    packed = gpu.pack_granules(arena.to(device), there(granules, device), heads, "fp8")
    assert torch.equal(packed.cpu(), wanted)
    reference.unpack_granules(target, granules, heads, "fp8", wanted)
    gpu.unpack_granules(found, there(granules, device), heads, "fp8", packed)
    assert torch.equal(moved(found).cpu(), moved(target))


@each_dtype
@each_heads
@each_shape
@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
def test_quantised_granules_are_the_same_within_a_step(
    device: torch.device, wire: Any, shape: tuple[int, int], heads: slice, dtype: torch.dtype
) -> None:
    """Sums are taken in another order: a number in ten thousand falls on the other side of a tie."""
    arena, granules = arena_of(shape, dtype), chosen(shape)
    wanted = reference.pack_granules(arena, granules, heads, wire).view(3, -1)
    packed = gpu.pack_granules(arena.to(device), there(granules, device), heads, wire).cpu().view(3, -1)
    at = 2 * 2 * (heads.stop - heads.start) * 16 * 2
    scales, of_reference = (each[:, :at].contiguous().view(torch.bfloat16).float() for each in (packed, wanted))
    torch.testing.assert_close(scales, of_reference, rtol=2**-7, atol=0.0)
    kind = torch.int8 if wire == "int8" else torch.float8_e4m3fn
    numbers, of_reference = (each[:, at:].contiguous().view(kind).float() for each in (packed, wanted))
    if wire == "int8":
        torch.testing.assert_close(numbers, of_reference, rtol=0.0, atol=1.0)
    else:
        torch.testing.assert_close(numbers, of_reference, rtol=2**-3, atol=2**-9)
    assert (numbers != of_reference).float().mean() < 0.02


@each_dtype
@each_heads
@each_shape
@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
def test_quantised_granules_unpack_to_the_same_numbers(
    device: torch.device, wire: Any, shape: tuple[int, int], heads: slice, dtype: torch.dtype
) -> None:
    arena, granules = arena_of(shape, dtype), chosen(shape)
    packed = reference.pack_granules(arena, granules, heads, wire)
    target, found = torch.zeros_like(arena), torch.zeros_like(arena, device=device)
    reference.unpack_granules(target, granules, heads, wire, packed)
    gpu.unpack_granules(found, there(granules, device), heads, wire, packed.to(device))
    near = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.cpu(), target, rtol=near, atol=1e-5)


def test_packing_lands_where_it_is_told(device: torch.device) -> None:
    arena, granules = arena_of((16, 32), torch.bfloat16).to(device), there(chosen((16, 32)), device)
    size = 3 * reference.granule_bytes(2, 3, 32, "int8")
    out = torch.zeros(size, dtype=torch.uint8, device=device)
    assert gpu.pack_granules(arena, granules, slice(0, 3), "int8", out).data_ptr() == out.data_ptr()
    assert out.any()


def test_what_lies_askew_is_packed_elsewhere_and_unpacked_all_the_same(device: torch.device) -> None:
    arena, granules = arena_of((16, 32), torch.bfloat16).to(device), there(chosen((16, 32)), device)
    size = 3 * reference.granule_bytes(2, 3, 32, "int8")
    askew = torch.zeros(size + 1, dtype=torch.uint8, device=device)[1:]
    packed = gpu.pack_granules(arena, granules, slice(0, 3), "int8", askew)
    askew.copy_(packed)
    one, other = torch.zeros_like(arena), torch.zeros_like(arena)
    gpu.unpack_granules(one, granules, slice(0, 3), "int8", askew)
    gpu.unpack_granules(other, granules, slice(0, 3), "int8", packed)
    assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(32, 32), (64, 80)], ids=str)
@each_dtype
@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")  # in the interpreter
def test_what_is_not_finite_is_none_there_either(
    device: torch.device, wire: Any, shape: tuple[int, int], dtype: torch.dtype, bad: float
) -> None:
    arena, granules, heads = arena_of(shape, dtype), chosen(shape), slice(0, 3)
    arena[5, 1, 0, 2, 7, 5] = bad
    found = torch.zeros_like(arena, device=device)
    packed = gpu.pack_granules(arena.to(device), there(granules, device), heads, wire)
    gpu.unpack_granules(found, there(granules, device), heads, wire, packed)
    rows = found.cpu().float().isfinite().all(-1)
    assert not found.cpu()[5, 1, 0, 2, 7, 5].isfinite()
    assert int((~rows).sum()) == 1
