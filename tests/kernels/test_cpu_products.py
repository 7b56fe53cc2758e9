"""A product in C++ is its reference's, in bf16 and in int8, and a row of it is its own affair."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu import panels
from kernels.cpu.library import NoLibrary, load_library
from kernels.cpu.panels import PANEL_OF, Panels, RowFormat, Rows, panel_bytes
from kernels.cpu.products import Activations, multiply, reason_against_int8
from kernels.reference.low_bits import grouped_linear, narrow_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS: tuple[RowFormat, ...] = ("Q4_0", "Q4_1", "Q8_0")
SIZES = [(32, 7), (96, 40), (576, 100), (1536, 64)]
"""Inputs and columns; most are no whole number of panels."""
ROWS = 259
"""A block of 252 rows and some."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        library = load_library(tmp_path_factory.mktemp("native"))
    except NoLibrary as error:
        pytest.skip(f"no C++ kernels here: {error}")
    if reason := reason_against_int8(library):
        pytest.skip(f"no int8 here: {reason}")
    return library


def weights(library: ctypes.CDLL, kind: RowFormat, inputs: int, columns: int) -> tuple[Panels, Tensor]:
    """In panels, and the numbers that they stand for: [columns, inputs] fp32"""
    numbers = np.random.default_rng(columns).standard_normal((columns, inputs)).astype(np.float32)
    to = gguf.GGMLQuantizationType[kind]
    stored = np.ascontiguousarray(gguf.quants.quantize(numbers, to))
    room = torch.empty(panel_bytes(PANEL_OF[kind], inputs, columns), dtype=torch.uint8)
    packed = panels.pack(library, kind, panels.in_order([Rows(kind, stored)]), inputs, room)
    return packed, torch.from_numpy(gguf.quants.dequantize(stored, to))


def rows(inputs: int, count: int = ROWS) -> Tensor:
    """Of sizes that differ between rows and between groups; one row of zeros."""
    random = torch.Generator().manual_seed(inputs)
    x = torch.randn(count, inputs, generator=random) * torch.logspace(-3, 3, count)[:, None]
    x *= torch.logspace(0, 2, inputs // 32).repeat_interleave(32)
    x[count // 2] = 0.0
    return x.bfloat16()


def in_pieces(library: ctypes.CDLL, x: Tensor, packed: Panels, sizes: Sequence[int], way: Activations) -> Tensor:
    return torch.cat([multiply(library, piece.contiguous(), packed, way) for piece in x.split(list(sizes))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "columns"), SIZES)
def test_it_is_the_references_product(library: ctypes.CDLL, kind: RowFormat, inputs: int, columns: int) -> None:
    packed, exact = weights(library, kind, inputs, columns)
    x = rows(inputs)
    # fp32's rounding of a sum over `inputs`, relative to the sizes of what is summed.
    size = x.float().norm(dim=1)[:, None] * exact.norm(dim=1)
    off = (multiply(library, x, packed, "int8") - grouped_linear(x, exact)).abs()
    assert (off <= 1e-6 * size).all()
    plain = (multiply(library, x, packed, "bf16") - x.float() @ exact.bfloat16().float().T).abs()
    assert (plain <= 1e-6 * size).all()
    # And int8 is what it says: near the product of what was not rounded, but not it.
    rounded = (grouped_linear(x, exact) - x.float() @ exact.T).square().sum(1).sqrt()
    assert (rounded <= 0.02 * size.square().sum(1).sqrt()).all()
    assert rounded.max() > 0


@pytest.mark.parametrize("way", ["bf16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_are_the_same_in_every_batch(library: ctypes.CDLL, kind: RowFormat, way: Activations) -> None:
    packed, _ = weights(library, kind, 96, 70)
    x = rows(96)
    whole = multiply(library, x, packed, way)
    for sizes in ((1,) * ROWS, (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 188), (253, 6), (258, 1)):
        assert torch.equal(in_pieces(library, x, packed, sizes, way), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_own_row(library: ctypes.CDLL, kind: RowFormat, bad: float) -> None:
    packed, _ = weights(library, kind, 64, 40)
    x = rows(64, 9)
    clean = multiply(library, x, packed, "int8")
    x[3, 41] = bad
    spoiled = multiply(library, x, packed, "int8")
    assert not spoiled[3].isfinite().any()
    others = torch.arange(9) != 3
    assert torch.equal(spoiled[others], clean[others])
    assert clean.isfinite().all()


def test_numbers_of_every_size_are_rounded_to_the_nearest(library: ctypes.CDLL) -> None:
    ones = np.concatenate([np.ones((32, 1), np.float16).view(np.uint8), np.eye(32, dtype=np.uint8)], axis=1)
    room = torch.empty(panel_bytes("q8", 32, 32), dtype=torch.uint8)
    packed = panels.pack(library, "Q8_0", panels.in_order([Rows("Q8_0", ones)]), 32, room)
    sizes = torch.tensor([1e-38, 1e-31, 2e-30, 1e-20, 1.0, 3e4, 1e30, 3e38])
    x = (torch.linspace(-1, 1, 32) * sizes[:, None]).bfloat16()
    numbers, scales = narrow_groups(x)
    assert torch.equal(multiply(library, x, packed, "int8"), numbers * scales)
    assert numbers.abs().amax(1).tolist() == [0.0, 0.0, 127.0, 127.0, 127.0, 127.0, 127.0, 127.0]
