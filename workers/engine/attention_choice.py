"""Triton or FlashInfer: who computes a GPU model's attention. Knows neither, only what came of trying them.

What doesn't agree with Triton's kernels, which are tested against the reference, is never taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from diptych.types import AttentionKernels
from kernels.gpu.attention import Attention
from workers.engine.attention_trial import TIMED, Lengths, Part, Shape, difference, pace
from workers.engine.model_config import UnsupportedModel

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_WORTH_IT: Final = 1.05
"""How much faster it must be: less is noise."""
_MOST_TOLD: Final = 200


class Choice(NamedTuple):
    """Who computes attention."""

    attention: Attention
    how: str
    """As the end of a sentence."""


class Candidate(NamedTuple):
    """FlashInfer, if it can be had."""

    reason_against: str
    """Empty if there is none."""
    make: Callable[[], Attention]
    """May raise anything: it imports, and compiles when it first runs."""


def chosen_attention(
    asked: AttentionKernels,
    ours: Attention,
    candidate: Candidate,
    shape: Shape,
    device: torch.device,
    *,
    graphs: bool,
    timed: Lengths = TIMED,
) -> Choice:
    """ours: Triton's, which also decodes wherever steps are CUDA graphs. Raises UnsupportedModel for FlashInfer that
    was asked for and can't be had."""
    if asked == "triton":
        return Choice(ours, ", attention triton")
    parts: tuple[Part, ...] = ("prefill",) if graphs else ("prefill", "decode")
    theirs, paces, reason = _tried(candidate, ours, parts, shape, device, timed)
    if theirs is None:
        if asked == "flashinfer":
            raise UnsupportedModel(f"engine.attention = flashinfer: {reason}; set it to auto or triton")
        return Choice(ours, f", attention triton (auto: {reason})")
    taken, told = ours, list[str]()
    for part, speed in paces.items():
        by = "flashinfer" if asked == "flashinfer" or speed >= _WORTH_IT else "triton"
        if by == "flashinfer":
            taken = taken._replace(**{part: getattr(theirs, part)})
        measured = f"flashinfer has {speed:.2f}x the pace of triton"
        told.append(f"{_WORDS[part]} {by} ({'auto: ' if asked == 'auto' else ''}{measured})")
    if graphs:
        told.append("of decoding triton (CUDA graphs)")
    return Choice(taken, f", attention {', '.join(told)}")


_WORDS: Final[dict[Part, str]] = {"prefill": "of prompts", "decode": "of decoding"}


def _tried(
    candidate: Candidate, ours: Attention, parts: tuple[Part, ...], shape: Shape, device: torch.device, timed: Lengths
) -> tuple[Attention | None, dict[Part, float], str]:
    """The candidate and its paces, or None and why not. One part that is wrong discredits the other."""
    if candidate.reason_against:
        return None, {}, candidate.reason_against
    _log.info("trying FlashInfer, which may compile for some minutes")
    try:
        theirs = candidate.make()
        off = max(difference(part, ours, theirs, shape, device) for part in parts)
        off = max(off, *(difference(part, ours, theirs, shape, device, timed, small=False) for part in parts))
        if off <= 1:
            return theirs, {part: pace(part, ours, theirs, shape, device, timed) for part in parts}, ""
        reason = f"FlashInfer's results lie {off:.3g}x as far from Triton's as rounding explains"
    except Exception as error:  # whatever an import, a compiler or a kernel of others raises
        first = next(iter(str(error).splitlines()), "")[:_MOST_TOLD]
        reason = f"FlashInfer failed: {type(error).__name__}: {first}"
    _log.warning("%s: it is not used", reason)
    return None, {}, reason
