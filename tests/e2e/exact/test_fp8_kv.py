"""KV in fp8 on the real model, by the fastest kernels here: handed over it has the bits of one place; what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from diptych.types import ModelSource
    from tests.e2e.exact.conftest import Hold, Lone, Said

pytestmark = [pytest.mark.e2e, pytest.mark.full]


def test_a_handed_over_cache_has_the_bits_of_one_in_place_and_says_nearly_what_fp32_says(
    hold: Hold,
    hold_apart: Callable[..., AbstractContextManager[Lone]],
    default_model: ModelSource,
    prompts: list[tuple[int, ...]],
    reference: list[Said],
) -> None:
    chosen = [said.tokens for said in reference]
    with hold(default_model, "bf16", "fp8") as lone:
        in_place = lone.answers(prompts, len(chosen[0]), chosen)
    with hold_apart(default_model, "bf16", "native", "fp8") as pair:
        handed_over = pair.answers(prompts, len(chosen[0]), chosen)
    assert {said.served.how for said in handed_over if said.served} == {"remote"}
    assert [said.argmax for said in handed_over] == [said.argmax for said in in_place]
    assert [said.fingerprints for said in handed_over] == [said.fingerprints for said in in_place]
    share = sum(a == b for said in in_place for a, b in zip(said.argmax, said.tokens, strict=True))
    total = sum(len(said.tokens) for said in in_place)
    print(f"\nKV in fp8 chooses what fp32 chooses in {share / total:.2%} of {total} positions")
    assert share / total >= 0.85
