"""A row of a matrix product is its own affair."""

from __future__ import annotations

import pytest
import torch

from kernels import linear, row_tile

SHAPES = [(576, 192), (576, 576), (64, 128), (576, 3072), (1536, 576)]


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_a_rows_bits_are_the_same_in_every_batch(inner: int, outer: int) -> None:
    random = torch.Generator().manual_seed(inner + outer)
    x, weight = torch.randn(130, inner, generator=random), torch.randn(outer, inner, generator=random)
    whole = linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 7, 8, 16, 31, 129):
        assert torch.equal(linear(x[:rows], weight), whole[:rows])
        assert torch.equal(linear(x[-rows:], weight), whole[-rows:])


def test_it_is_the_product_with_the_bias() -> None:
    x, weight, bias = torch.randn(5, 64), torch.randn(32, 64), torch.randn(32)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-4)
    assert linear(x, weight, bias).shape == (5, 32)


def test_a_tile_is_four_rows_for_each_thread() -> None:
    assert row_tile() == 4 * torch.get_num_threads()
