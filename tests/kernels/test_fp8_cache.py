"""A cache in fp8: every number rounded once, the same by torch and by C++, and read as what it stands for."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from kernels import DecodeTable, decode_attention, prefill_attention, write_kv
from kernels.cpu.library import NoLibrary, load_library
from kernels.reference.fp8 import FP8, LARGEST, narrowed

BLOCK, HEADS, DIM = 16, 2, 32


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        return load_library(tmp_path_factory.mktemp("native"))
    except NoLibrary as error:
        pytest.skip(f"no C++ kernels here: {error}")


def all_codes() -> Tensor:
    """[256] every number that fp8 has, NaN twice."""
    return torch.arange(256, dtype=torch.uint8).view(FP8)


def edges() -> Tensor:
    """fp32: every number of fp8, every tie between two, what is just beside a tie, and what there is no room for."""
    numbers = all_codes().float().unique()
    numbers = numbers[numbers.isfinite()]
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    far = torch.tensor([449.0, 464.0, 465.0, 480.0, 1e4, 3e38, 1e-30, 1e-42, -0.0])
    found = torch.cat([numbers, ties, *beside, far, -far])
    return torch.nn.functional.pad(found, (0, -len(found) % 32))


def test_numbers_of_fp8_are_kept_and_too_large_ones_become_the_largest() -> None:
    codes = all_codes()
    assert torch.equal(narrowed(codes.float(), FP8).view(torch.uint8)[:127], codes.view(torch.uint8)[:127])
    large = torch.tensor([448.0, 449.0, 1e4, 3e38])
    for dtype in (torch.float32, torch.bfloat16):
        assert narrowed(large.to(dtype), FP8).float().tolist() == [LARGEST] * 4
        assert narrowed(-large.to(dtype), FP8).float().tolist() == [-LARGEST] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_nan(bad: float) -> None:
    """Its sequence has to fail: as the largest number it would go on with an answer that nobody computed."""
    found = narrowed(torch.tensor([1.0, bad, 2.0]), FP8).float()
    assert found.isnan().tolist() == [False, True, False]


def test_a_number_goes_to_the_nearest_and_a_tie_to_the_even_one() -> None:
    wide, numbers = edges(), all_codes().float()
    finite = numbers[numbers.isfinite()].double()
    exact = wide.double().clamp(-LARGEST, LARGEST)
    found = narrowed(wide, FP8)
    off = (found.double() - exact).abs()
    apart = (finite[None] - exact[:, None]).abs()
    assert torch.equal(off, apart.amin(1))
    is_tie = (apart == apart.amin(1, keepdim=True)).logical_and(finite[None] != 0).sum(1) == 2
    assert is_tie.sum() > 200
    assert not (found.view(torch.uint8)[is_tie] & 1).any()


def test_cpp_rounds_as_torch_does(library: ctypes.CDLL) -> None:
    random = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 1 << 16)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf] * 32)
    for wide in (edges(), random, bad):
        found = torch.empty(len(wide), dtype=torch.uint8)
        library.diptych_narrow_fp8(
            ctypes.c_void_p(wide.data_ptr()), ctypes.c_int64(len(wide)), ctypes.c_void_p(found.data_ptr())
        )
        wanted = narrowed(wide, FP8)
        nan = wanted.float().isnan()
        assert torch.equal(found[~nan], wanted.view(torch.uint8)[~nan])
        assert (found[nan] & 0x7F == 0x7F).all()


def test_cpp_reads_every_number_as_torch_does(library: ctypes.CDLL) -> None:
    codes = all_codes()
    found = torch.empty(256, dtype=torch.bfloat16)
    library.diptych_widen_fp8(ctypes.c_void_p(codes.data_ptr()), ctypes.c_int64(256), ctypes.c_void_p(found.data_ptr()))
    wanted = codes.to(torch.bfloat16)
    nan = wanted.isnan()
    assert int(nan.sum()) == 2
    assert torch.equal(found[~nan].view(torch.int16), wanted[~nan].view(torch.int16))
    assert found[nan].isnan().all()


def test_keys_and_values_are_written_rounded_and_no_other_touched() -> None:
    arena = torch.zeros(6, 3, 2, HEADS, BLOCK, DIM).to(FP8)
    keys, values = torch.randn(3, HEADS, DIM), torch.randn(3, HEADS, DIM).bfloat16()
    keys[0, 0, 0], values[1, 1, 1] = 1e4, -1e4
    blocks, offsets = torch.tensor([3, 3, 0]), torch.tensor([14, 15, 5])
    write_kv(arena[:, 1], keys, values, blocks, offsets)
    expected = torch.zeros(6, 3, 2, HEADS, BLOCK, DIM)
    for token in range(3):
        expected[blocks[token], 1, 0, :, offsets[token]] = narrowed(keys, FP8)[token].float()
        expected[blocks[token], 1, 1, :, offsets[token]] = narrowed(values, FP8)[token].float()
    assert torch.equal(arena.float(), expected)
    assert expected.max() == LARGEST
    assert expected.min() == -LARGEST


def test_attention_reads_what_the_numbers_stand_for() -> None:
    random = torch.Generator().manual_seed(3)
    narrow = (torch.randn(40, 2, HEADS, BLOCK, DIM, generator=random) * 3).to(FP8)
    query = torch.randn(300, HEADS * 2, DIM, generator=random)
    blocks = torch.randperm(40, generator=random)[:32]
    both = [prefill_attention(query, cache, blocks, 0, DIM**-0.5) for cache in (narrow, narrow.float())]
    assert torch.equal(*both)
    table = DecodeTable(blocks[None], torch.tensor([290]), (1, 1))
    both = [decode_attention(query[:1], cache, table, DIM**-0.5) for cache in (narrow, narrow.float())]
    assert torch.equal(*both)
