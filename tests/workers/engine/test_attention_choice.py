"""Who computes attention: what agrees and is faster, never what doesn't agree. The candidates here are torch's own."""

from __future__ import annotations

import logging
import time
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from kernels.gpu.attention import Attend, Attention, PagedBatch
from kernels.gpu.paged import Look
from tests.kernels.attention_ways import Fault, reference_attention, torch_attention
from workers.engine.attention_choice import Candidate, Choice, chosen_attention
from workers.engine.attention_trial import CHECKED, Lengths, Shape, difference, pace
from workers.engine.model_config import UnsupportedModel

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 64, 16, torch.bfloat16, (Look(0.125), Look(0.125, window=100, soft_cap=50.0)))
WIDE = Shape(3, 1, 80, 32, torch.bfloat16, (Look(0.1, window=4096),))
FEW = Lengths((20, 3), ((16, 40),))
FAULTS = [fault for fault in get_args(Fault) if fault]
OURS = reference_attention()


def slowed(attention: Attention) -> Attention:
    def slow(attend: Attend) -> Attend:
        def slowly(query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
            time.sleep(0.02)
            attend(query, layer, batch, look, out)

        return slowly

    return Attention(*map(slow, attention))


def choose(asked: Any, theirs: Attention, ours: Attention = OURS, reason: str = "", *, graphs: bool = False) -> Choice:
    return chosen_attention(asked, ours, Candidate(reason, lambda: theirs), SHAPE, CPU, graphs=graphs, timed=FEW)


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["windows and caps", "odd sizes"])
@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_a_right_implementation_agrees(part: Any, shape: Shape) -> None:
    assert difference(part, OURS, torch_attention(), shape, CPU) < 1
    assert difference(part, torch_attention(), OURS, shape, CPU) < 1


@pytest.mark.parametrize("part", ["decode", "prefill"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_one_does_not(part: Any, fault: Fault) -> None:
    assert difference(part, OURS, torch_attention(fault), SHAPE, CPU) > 1


def test_one_that_writes_where_it_must_not_does_not_agree() -> None:
    def everything(query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
        OURS.decode(query, layer, batch, look, out)
        OURS.prefill(query, layer, batch, look, out)

    assert difference("decode", OURS, Attention(everything, everything), SHAPE, CPU) == torch.inf
    assert difference("prefill", OURS, Attention(everything, everything), SHAPE, CPU) == torch.inf


def test_the_pace_is_a_multiple_of_ours() -> None:
    assert pace("decode", slowed(OURS), OURS, SHAPE, CPU, FEW) > 1.5
    assert pace("prefill", OURS, slowed(OURS), SHAPE, CPU, FEW) < 0.7


def test_what_agrees_and_is_faster_is_taken() -> None:
    ours, theirs = slowed(OURS), torch_attention()
    choice = choose("auto", theirs, ours)
    assert choice.attention == theirs
    assert choice.how.startswith(", attention of prompts flashinfer (auto: flashinfer has ")
    assert ", of decoding flashinfer (auto: " in choice.how


def test_what_agrees_and_is_slower_is_taken_only_where_it_was_asked_for() -> None:
    theirs = slowed(OURS)
    assert choose("auto", theirs).attention == OURS
    assert "of prompts triton (auto: flashinfer has 0." in choose("auto", theirs).how
    asked = choose("flashinfer", theirs)
    assert asked.attention == theirs
    assert "of prompts flashinfer (flashinfer has 0." in asked.how


def test_graphs_decode_with_triton() -> None:
    ours, theirs = slowed(OURS), torch_attention()
    for asked in ("auto", "flashinfer"):
        choice = choose(asked, theirs, ours, graphs=True)
        assert choice.attention == Attention(ours.decode, theirs.prefill)
        assert choice.how.endswith(", of decoding triton (CUDA graphs)")


@pytest.mark.parametrize("fault", ["window", "NaN"])
def test_what_disagrees_is_never_taken(fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = slowed(OURS), torch_attention(fault)
    with caplog.at_level(logging.WARNING):
        choice = choose("auto", theirs, ours)
    assert choice.attention == ours
    assert "attention triton (auto: FlashInfer's results lie " in choice.how
    assert "as rounding explains: it is not used" in caplog.text
    with pytest.raises(UnsupportedModel, match=r"attention = flashinfer: .*results lie .*set it to auto or triton"):
        choose("flashinfer", theirs, ours)


def test_one_wrong_part_discredits_the_other() -> None:
    ours = slowed(OURS)
    assert choose("auto", Attention(torch_attention("last key").decode, OURS.prefill), ours).attention == ours


def test_what_breaks_is_told_and_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Ninja build failed\n" + "a very long log")

    with caplog.at_level(logging.WARNING):
        choice = choose("auto", Attention(broken, broken))
    assert choice == Choice(OURS, ", attention triton (auto: FlashInfer failed: RuntimeError: Ninja build failed)")
    assert "Ninja build failed" in caplog.text
    with pytest.raises(UnsupportedModel, match="FlashInfer failed: RuntimeError: Ninja build failed; set it to"):
        choose("flashinfer", Attention(broken, broken))


def test_what_is_right_only_in_small_is_not_taken() -> None:
    ours, few = slowed(OURS), sum(count for _, count in CHECKED.chunks) + len(CHECKED.decodes)

    def beyond(fault: Any) -> Attend:
        wrong = torch_attention(fault).prefill if fault else None

        def attend(query: Tensor, layer: Tensor, batch: PagedBatch, look: Look, out: Tensor) -> None:
            if len(query) == few:
                return OURS.prefill(query, layer, batch, look, out)
            if wrong is None:
                raise RuntimeError("workspace is too small")
            return wrong(query, layer, batch, look, out)

        return attend

    for fault, told in (("last key", "results lie "), ("", "FlashInfer failed: RuntimeError: workspace is too small")):
        choice = choose("auto", Attention(OURS.decode, beyond(fault)), ours)
        assert choice.attention == ours
        assert told in choice.how


def test_what_is_not_there_is_not_tried() -> None:
    reason = "FlashInfer is not installed"

    def never() -> Attention:
        raise AssertionError("made all the same")

    candidate = Candidate(reason, never)
    choice = chosen_attention("auto", OURS, candidate, SHAPE, CPU, graphs=True)
    assert choice == Choice(OURS, f", attention triton (auto: {reason})")
    with pytest.raises(UnsupportedModel, match="attention = flashinfer: FlashInfer is not installed; set it to auto"):
        chosen_attention("flashinfer", OURS, candidate, SHAPE, CPU, graphs=True)
    candidate = Candidate("", never)
    assert chosen_attention("triton", OURS, candidate, SHAPE, CPU, graphs=True) == Choice(OURS, ", attention triton")
