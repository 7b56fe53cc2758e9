"""Norms, turns, cache writes and gates on a GPU against `kernels.reference`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: `make gpu-check` installs it and runs these tests")

from kernels.gpu.gates import Gate, gated
from kernels.gpu.norms import add_rms_norm, rms_norm
from kernels.gpu.paged import PagedRows
from kernels.gpu.rope import HeadNorms, turn_and_write
from kernels.reference import elementwise as reference
from kernels.reference.blocks import write_kv
from kernels.reference.fp8 import FP8, LARGEST, narrowed

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
GATES = {"silu": reference.swiglu, "gelu": reference.geglu, "gelu_tanh": reference.tanh_geglu}
ULPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Of a number's size: sums in another order move bf16 by at most one of its steps."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), wanted, rtol=ULPS[wanted.dtype], atol=1e-6)


@each_dtype
@pytest.mark.parametrize("size", [16, 100, 4096])
@pytest.mark.parametrize("wide", [False, True], ids=["own weight", "fp32 weight"])
def test_a_norm(device: torch.device, dtype: torch.dtype, size: int, wide: bool) -> None:
    x, weight = drawn(5, size, dtype=dtype), drawn(size, dtype=torch.float32 if wide else dtype, seed=1)
    near(rms_norm(x.to(device), weight.to(device), 1e-5), reference.rms_norm(x, weight, 1e-5))


@each_dtype
@pytest.mark.parametrize("ends", [False, True], ids=["plain", "sandwich"])
def test_a_sum_and_its_norm(device: torch.device, dtype: torch.dtype, ends: bool) -> None:
    hidden, delta = drawn(5, 96, dtype=dtype), drawn(5, 96, dtype=dtype, seed=1)
    weight, end = drawn(96, dtype=dtype, seed=2), drawn(96, dtype=dtype, seed=3)
    on = [each.to(device) for each in (hidden, delta, weight)]
    total, normed = add_rms_norm(*on, 1e-5, end.to(device) if ends else None)
    wanted = hidden + (reference.rms_norm(delta, end, 1e-5) if ends else delta)
    torch.testing.assert_close(total.cpu(), wanted, rtol=2 * ULPS[dtype], atol=1e-6 if dtype == torch.float32 else 0.01)
    near(normed, reference.rms_norm(total.cpu(), weight, 1e-5))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # to infinity, whose inverse is 0
@each_dtype
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [48, 1500])
def test_a_gate(device: torch.device, dtype: torch.dtype, gate: Gate, size: int) -> None:
    gate_up = 3 * drawn(4, 2 * size, dtype=dtype)
    wanted = GATES[gate](*gate_up.chunk(2, dim=-1))
    found = gated(gate_up.to(device), gate).cpu()
    torch.testing.assert_close(found, wanted, rtol=3 * ULPS[dtype], atol=1e-5 if dtype == torch.float32 else 1e-3)


@each_dtype
@pytest.mark.parametrize("heads", [(4, 2, 16), (9, 3, 64), (3, 1, 80)], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_turned_queries_and_a_written_cache(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], normed: bool
) -> None:
    queries, kv, dim = heads
    qkv = drawn(5, (queries + 2 * kv) * dim, dtype=dtype)
    arena = drawn(9, 3, 2, kv, 16, dim, dtype=dtype, seed=1)
    table = reference.rope_table(100, dim, 10_000.0)
    positions, tables = [0, 17, 40, -1, 18], [[5], [2, 7], [1, 3, 8], [6], [2, 7]]
    starts = [0, 1, 3, 6, 1]
    norms = HeadNorms(drawn(dim, dtype=dtype, seed=2), drawn(dim, dtype=dtype, seed=3), 1e-6) if normed else None

    on = arena.to(device)
    rows = PagedRows(
        *(torch.tensor(each, dtype=torch.int32, device=device) for each in (positions, starts, [5, 2, 7, 1, 3, 8, 6]))
    )
    there = HeadNorms(norms.query.to(device), norms.key.to(device), norms.epsilon) if norms else None
    found = turn_and_write(qkv.to(device), on[:, 1], rows, table.to(device), there)

    live = [row for row, position in enumerate(positions) if position >= 0]
    q, k, v = (part.reshape(5, -1, dim) for part in qkv.split([queries * dim, kv * dim, kv * dim], dim=-1))
    if norms:
        q, k = reference.rms_norm(q, norms.query, norms.epsilon), reference.rms_norm(k, norms.key, norms.epsilon)
    turns = table[[max(0, position) for position in positions]]
    q, k = (reference.apply_rope(each.float(), turns).to(dtype) for each in (q, k))
    blocks = torch.tensor([tables[row][positions[row] // 16] for row in live])
    write_kv(arena[:, 1], k[live], v[live], blocks, torch.tensor([positions[row] % 16 for row in live]))
    close = {"rtol": 2 * ULPS[dtype], "atol": 1e-5 if dtype == torch.float32 else 0.03}
    torch.testing.assert_close(found.cpu()[live], q[live], **close)
    torch.testing.assert_close(on.cpu(), arena, **close)
    untouched = torch.ones(9, dtype=torch.bool)
    untouched[blocks] = False
    assert torch.equal(on.cpu()[untouched], arena[untouched])


@each_dtype
def test_a_cache_in_fp8_is_written_rounded_once_and_never_too_large(device: torch.device, dtype: torch.dtype) -> None:
    kv, dim = 2, 32
    qkv = drawn(3, 3 * kv * dim, dtype=dtype)
    of_values = qkv.view(3, 3, kv, dim)[:, 2]
    of_values[0, 0, :6] = torch.tensor([1e4, -1e4, 448.0, 464.0, 465.0, 2**-10]).to(dtype)
    of_values[1, 1, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(dtype)
    places = [torch.tensor(each, dtype=torch.int32, device=device) for each in ([3, 4, 20], [0, 0, 0], [1, 2])]
    table = reference.rope_table(100, dim, 10_000.0).to(device)
    wide, narrow = (torch.zeros(3, 2, kv, 16, dim, device=device).to(kind) for kind in (torch.float32, FP8))
    for layer in (wide, narrow):
        turn_and_write(qkv.to(device), layer, PagedRows(*places), table, None)
    found, wanted = narrow.float().cpu(), narrowed(wide, FP8).float().cpu()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert int(found.isnan().sum()) == 3
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert found[1, 1, 0, 3, :2].tolist() == [LARGEST, -LARGEST]
