"""Products in 8 bits on a GPU against `kernels.reference.low_bits`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

from kernels.gpu.low_bits import Bits, can_multiply, linear, narrow_rows
from kernels.reference import low_bits as reference

each_bits = pytest.mark.parametrize("bits", ["int8", "fp8"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@each_bits
@each_dtype
@pytest.mark.parametrize("columns", [32, 1000, 2048])
def test_rows_are_narrowed(device: torch.device, bits: Bits, dtype: torch.dtype, columns: int) -> None:
    x = (5 * torch.randn(4, columns, generator=torch.Generator().manual_seed(0))).to(dtype)
    x[2] = 0.0
    found = narrow_rows(x.to(device), bits, least_rows=6)
    numbers, scales = reference.narrow_rows(x, bits)
    torch.testing.assert_close(found.scales[:4].cpu(), scales, rtol=1e-6, atol=0.0)
    apart = (found.numbers[:4].float().cpu() - numbers.float()).abs()
    assert (apart > 0).float().mean() < 0.01, "but for ties, the same"
    assert (apart <= (1.0 if bits == "int8" else 32.0)).all()
    assert not found.numbers[4:].float().any()
    assert found.scales[4:].tolist() == [1.0, 1.0]


@each_bits
@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_a_product(device: torch.device, bits: Bits, rows: int, biased: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 128, generator=random).to(torch.bfloat16) for size in (rows, 272))
    bias = torch.randn(272, generator=random).to(torch.bfloat16) if biased else None
    narrow = narrow_rows(weight.to(device), bits)
    found = linear(x.to(device), narrow, None if bias is None else bias.to(device)).cpu()
    wanted = reference.narrow_linear(x, weight, bits, bias)
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=0.1)
    exact = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert (found.float() - exact).norm() < (0.015 if bits == "int8" else 0.05) * exact.norm()


@each_bits
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("at", [31, 1100])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_makes_its_own_row_so(device: torch.device, bits: Bits, bad: float, at: int) -> None:
    """A NaN that became a number would pass for an answer."""
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    clean = narrow_rows(x.to(device), bits)
    x[2, at] = bad
    found, wanted = narrow_rows(x.to(device), bits).scales.cpu(), reference.narrow_rows(x, bits)[1]
    assert found.isfinite().tolist() == wanted.isfinite().tolist() == [True, True, False, True]
    others = [0, 1, 3]
    assert torch.equal(found[others], clean.scales.cpu()[others])


def test_torch_takes_multiples_of_16() -> None:
    assert can_multiply(torch.empty(32, 48))
    assert not can_multiply(torch.empty(32, 40))
