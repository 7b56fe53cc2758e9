"""KV in fp8, by torch and by C++: the same bits however tokens come, and what is too large stays a number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from diptych.errors import Internal
from tests.workers.engine.test_native_model import LENGTH, wide_config
from tests.workers.engine.tiny_models import some_tokens
from workers.engine.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from workers.engine.weights import Weights

    Make = Callable[..., Any]

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
LENGTHS = (5, 16, 17, 100, 300, 513, 33, 1)
CASES = ["llama, grouped heads", "qwen3", "gemma2"]
"""Plain; heads that are normed; products that are normed, and windows."""


# ---- the engine, which computes with torch -------------------------------------------------------------------


def mixed(prompt: Make, request_for: Make) -> list[Any]:
    """Greedy and sampled ones of mixed lengths; the same each time."""
    return [
        request_for(prompt(length, seed=length), max_tokens=20, temperature=0.9 * (at % 2))
        for at, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 48}, {"max_batch_tokens": 16, "max_running": 3}], ids=str)
def test_a_batch_has_the_bits_that_each_has_alone(
    bench: Make, prompt: Make, request_for: Make, limits: dict[str, int]
) -> None:
    alone = [bench("fp8").answers(request)[0] for request in mixed(prompt, request_for)]
    engine = bench("fp8", **limits)
    assert engine.arena.dtype == FP8
    assert engine.answers(*mixed(prompt, request_for), each_steps=3) == alone
    computed = engine.counters().prompt_tokens_computed
    assert engine.answers(*mixed(prompt, request_for)) == alone  # and from the cache
    assert engine.counters().prompt_tokens_computed - computed <= 16 * len(LENGTHS)


def test_the_bits_are_not_those_of_a_wider_cache(bench: Make, prompt: Make, request_for: Make) -> None:
    """Or nothing here would be about fp8."""
    request = request_for(prompt(40), max_tokens=1)
    [[narrow]], [[wide]] = bench("fp8").answers(request), bench("fp32").answers(request)
    assert narrow.fingerprint != wide.fingerprint


def test_too_large_values_are_cut_and_fail_nobody(
    bench: Make, weights: Weights, prompt: Make, request_for: Make
) -> None:
    loud = {name: weight * 1e5 if "v_proj" in name else weight for name, weight in weights.tensors.items()}
    model = Model(replace(weights, tensors=loud), max_context=8192, device=CPU)
    request = request_for(prompt(40), max_tokens=4)
    exact, engine = bench(model=model), bench("fp8", model=model)
    exact.answers(request)
    assert exact.arena.abs().max() > 1e4, "the test means nothing if nothing is too large"
    [said] = engine.answers(request)
    assert len(said) == 4
    held = engine.arena.float()
    assert held.isfinite().all()
    assert held.abs().max() == 448.0


def test_what_is_not_finite_fails_its_own_request_and_leaves_no_trace(
    bench: Make, prompt: Make, request_for: Make
) -> None:
    clean = bench("fp8").answers(request_for(prompt(300, seed=1), max_tokens=12))[0]
    engine = bench("fp8", max_batch_tokens=400)
    victim = engine.sequence(request_for(prompt(100), max_tokens=50))
    other = engine.sequence(request_for(prompt(300, seed=1), max_tokens=12))
    engine.add(victim)
    engine.add(other)
    engine.plan()
    engine.arena[victim.blocks[0], 0, 1, 0, 0] = torch.nan
    failed, said = [], []
    while engine.has_work:
        if not failed:
            engine.arena[victim.blocks[-1], 1, 1, 0, 3] = torch.nan
        result = engine.step()
        failed += result.failed
        said += [(each.token, each.fingerprint) for each in result.sampled if each.sequence is other]
        for sampled in result.sampled:
            if sampled.finish:
                engine.drop(sampled.sequence)
    assert [(sequence, type(error)) for sequence, error in failed] == [(victim, Internal)]
    assert said == [tuple(token) for token in clean]
    assert engine.arena.float().isfinite().all()


# ---- C++ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_cpp_is_as_near_to_fp32_as_torch_in_bf16_is(
    case: str, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config(case))
    of_bf16, tokens = load(tmp_path, dtype="bf16"), some_tokens(LENGTH)
    exact = replace(of_bf16, tensors={name: each.float() for name, each in of_bf16.tensors.items()})
    reference, ours, torchs = (
        paged(exact, kv=FP8),
        paged(of_bf16, model=native(of_bf16), kv=FP8),
        paged(of_bf16, kv=FP8),
    )
    wanted = reference.feed(tokens, [LENGTH])
    assert wanted.std() > 0.3, "the comparison means nothing if nothing is said"
    whole = ours.feed(tokens, [LENGTH])
    off, of_torch = ((each - wanted).square().mean().sqrt() for each in (whole, torchs.feed(tokens, [LENGTH])))
    # A number that falls on the other side of a tie is off by a whole step of fp8: the two are alike, not ordered.
    assert off <= 1.25 * of_torch
    # The first layer has hardly rounded yet: nearly all of its numbers are the same.
    mine, theirs = (each.arena[:, 0].view(torch.uint8) for each in (ours, reference))
    assert (mine != theirs).sum() < 0.1 * (theirs != 0).sum()


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_single_tokens_are_the_same_bits(
    case: str, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config(case))
    of_bf16, tokens = load(tmp_path, dtype="bf16"), some_tokens(LENGTH)
    model = native(of_bf16)
    ours = paged(of_bf16, model=model, kv=FP8)
    whole = ours.feed(tokens, [LENGTH])
    assert torch.equal(ours.feed(tokens, [1, 15, 37, 3, 200, 16, 280]), whole)
    assert torch.equal(ours.feed(tokens, [100, 410]), whole)
    assert not torch.equal(paged(of_bf16, model=model).feed(tokens, [LENGTH]), whole), "this is bf16"


def test_a_batch_changes_no_bit(peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path) -> None:
    peer(wide_config("llama, grouped heads"))
    of_bf16 = load(tmp_path, dtype="bf16")
    ours = paged(of_bf16, model=native(of_bf16), sequences=24, kv=FP8)
    texts = [some_tokens(length, seed=length) for length in (540, 300, 20, *range(30, 200, 9))]
    alone = [ours.feed(text, [len(text)]) for text in texts]
    fed = [ours.sequence() for _ in texts]
    for sequence, text in zip(fed, texts, strict=True):
        ours.step([], [(sequence, text[:-9])])
    decodes = [(sequence, text[-9]) for sequence, text in zip(fed[1:], texts[1:], strict=True)]
    together = ours.step(decodes, [(fed[0], texts[0][-9:-2])])
    by_length = sorted(range(1, len(texts)), key=lambda at: -len(texts[at]))
    assert torch.equal(together, torch.cat([*(alone[at][-9:-8] for at in by_length), alone[0][-9:-2]]))


def test_blocks_may_hold_anything_beyond_the_end_and_nan_shows_before_it(
    peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    of_bf16, tokens = load(tmp_path, dtype="bf16"), some_tokens(41)
    ours = paged(of_bf16, model=native(of_bf16), kv=FP8)
    clean = ours.feed(tokens, [20])
    ours.arena.fill_(torch.nan)
    assert torch.equal(ours.feed(tokens, [20]), clean)
    fed = ours.sequence()
    ours.step([], [(fed, tokens[:-1])])
    ours.arena[fed.blocks[1], 0, 0, 0, 3] = torch.nan  # one key of one head
    assert ours.said([(fed, tokens[-1])], []).finite.tolist() == [False]


def test_too_large_values_are_cut_as_torch_cuts_them(
    peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    of_bf16, tokens = load(tmp_path, dtype="bf16"), some_tokens(40)
    loud = {name: each * 1e4 if "v_proj" in name else each for name, each in of_bf16.tensors.items()}
    louder = replace(of_bf16, tensors=loud)
    ours, torchs = paged(louder, model=native(louder), kv=FP8), paged(louder, kv=FP8)
    said: list[Tensor] = [each.feed(tokens, [40]) for each in (ours, torchs)]
    assert all(logits.isfinite().all() for logits in said)
    mine, theirs = (each.arena[:, 0, 1].float() for each in (ours, torchs))
    assert mine.abs().max() == theirs.abs().max() == 448.0
    assert (mine.abs() == 448.0).sum() > 0.5 * (mine != 0).sum()
    # torch rounds to bf16 first, and what is left of a loud sum that cancels is rounding.
    assert (mine != theirs).sum() < 0.05 * (mine != 0).sum()
