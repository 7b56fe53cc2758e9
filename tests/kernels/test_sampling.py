"""Which token is drawn: `transformers`' distribution, and the same token whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import kernels
from kernels.reference.sampling import HEAD, highest

SETTINGS = (
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": HEAD + 40},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.1, "top_k": 300, "top_p": 0.99, "min_p": 0.02},
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randomly(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def sampling(uniform: Tensor, **each: float) -> kernels.Sampling:
    def column(name: str, default: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((len(uniform),), each.get(name, default), dtype=dtype)

    return kernels.Sampling(
        column("temperature", 1.0), column("top_k", 0, torch.int64), column("top_p", 1.0), column("min_p", 0.0), uniform
    )


def expected(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Probabilities as `transformers` makes them: [vocabulary] fp64."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros((1, 1), dtype=torch.int64), logits[None]).double().softmax(-1)[0]


def grid(points: int) -> Tensor:
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0], ids=["flat", "uneven", "peaked"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_even_noise_gives_each_token_its_share(setting: dict[str, float], scale: float) -> None:
    logits, points = randomly(400, scale=scale), 1024
    tokens = kernels.sample_tokens(logits.expand(points, -1), sampling(grid(points), **setting))
    shares = torch.bincount(tokens, minlength=400).double() / points
    probabilities = expected(logits, **setting)
    # A token's stretch of the line holds its share of the points, but for one at each end.
    assert (shares - probabilities).abs().max() <= 1.001 / points
    assert not shares[probabilities == 0].any()


def test_tokens_lie_on_the_line_by_falling_probability_and_equal_ones_by_id() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, -1.0, 0.0])
    tokens = kernels.sample_tokens(logits.expand(64, -1), sampling(grid(64)))
    assert tokens.unique_consecutive().tolist() == [1, 2, 0, 4, 3]


def test_zero_temperature_is_the_first_of_the_highest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, -torch.inf]])
    assert kernels.sample_tokens(logits, sampling(grid(2), temperature=0.0)).tolist() == [1, 0]


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.full((3, 700), -torch.inf)
    logits[:, [5, 600]] = torch.tensor([1.0, 1.0])
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for setting in SETTINGS[:1] + SETTINGS[6:10]:
        assert set(kernels.sample_tokens(logits, sampling(ends, **setting)).tolist()) <= {5, 600}
    assert kernels.sample_tokens(logits, sampling(ends)).tolist() == [5, 600, 600]


@pytest.mark.parametrize("vocabulary", [7, 4096, 16_384, 20_011])
@pytest.mark.parametrize("step", [0.0, 1e-3, 0.5, 10.0], ids=["no ties", "few", "many", "nearly all"])
def test_the_highest_are_those_of_a_stable_sort(vocabulary: int, step: float) -> None:
    values = randomly(9, vocabulary, scale=3, seed=4)
    values = (values / step).round() * step if step else values
    values[3, vocabulary // 3 :] = -torch.inf
    values[4] = -values[4].abs()
    for count in (0, 1, 5, 20, HEAD, vocabulary):
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(highest(values, min(count, vocabulary)), order)


@pytest.mark.parametrize("vocabulary", [5, HEAD, HEAD + 1, 1003, 20011])
def test_a_batch_draws_what_each_row_draws_alone(vocabulary: int, threads: int) -> None:
    rows = 4 * len(SETTINGS)
    # From so flat that most draws end beyond the head to so peaked that none does.
    logits = randomly(rows, vocabulary, seed=1) * torch.linspace(0.1, 8, rows)[:, None]
    parts = [sampling(torch.zeros(1, dtype=torch.float64), **SETTINGS[row % len(SETTINGS)]) for row in range(rows)]
    together = kernels.Sampling(*(torch.cat(column) for column in zip(*parts, strict=True)))
    together.temperature[::7] = 0
    together = together._replace(
        top_k=together.top_k.clamp_max(vocabulary),
        uniform=torch.rand(rows, generator=torch.Generator().manual_seed(2)).double(),
    )
    alone = [
        kernels.sample_tokens(
            logits[row : row + 1].clone(), kernels.Sampling(*(each[row : row + 1] for each in together))
        )
        for row in range(rows)
    ]
    assert torch.equal(kernels.sample_tokens(logits, together), torch.cat(alone))
    torch.set_num_threads(3 - threads)
    assert torch.equal(kernels.sample_tokens(logits, together), torch.cat(alone))
