"""From logits to tokens with one uniform each: inverse-CDF sampling. Knows no request.

A token is chosen by its own row, parameters and uniform only. That holds to the bit, whatever the
batch, the threads and the way taken: tokens are ordered by one integer each, no two alike, and
probabilities are whole numbers held in fp64, whose sums are exact in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HEAD = 256
"""Tokens ordered first. Few draws end beyond; those rows are ordered whole."""
_CHUNK = 16
_LAST_ID = 0xFFFFFFFF


class Sampling(NamedTuple):
    """How each row is drawn from: [rows] each, fp64 but for `top_k`."""

    temperature: Tensor
    """0 is greedy."""
    top_k: Tensor
    """int64; 0 is no limit."""
    top_p: Tensor
    """In (0, 1]."""
    min_p: Tensor
    """In [0, 1]: the least probability that is kept, as a share of the highest."""
    uniform: Tensor
    """In [0, 1)."""


class _Line(NamedTuple):
    """Tokens by falling probability, equal ones by id: [rows, length] each."""

    tokens: Tensor
    weights: Tensor
    sums: Tensor
    """Running sums of `weights`."""


def sample_tokens(logits: Tensor, how: Sampling) -> Tensor:
    """logits: [rows, vocabulary] fp32, none of them all -inf → token ids [rows].

    The order is temperature, top-k, top-p, min-p, as in `transformers`. The kept tokens are laid on
    the line by falling probability and the one at `uniform` is taken. Greedy is the highest logit.
    """
    drawn = (how.temperature > 0).nonzero().flatten()
    if len(drawn) == len(logits):
        return _draw(logits, how)
    tokens = logits.argmax(-1)
    if len(drawn):
        tokens[drawn] = _draw(logits[drawn], Sampling(*(each[drawn] for each in how)))
    return tokens


def _draw(logits: Tensor, how: Sampling) -> Tensor:
    scaled = logits / how.temperature.float()[:, None]
    weights = _weights(scaled)
    total = weights.double().sum(-1)
    tokens, decided = _choose(_line(scaled, weights, HEAD), total, logits.shape[-1], how)
    undecided = (~decided).nonzero().flatten()
    if len(undecided):
        rest = Sampling(*(each[undecided] for each in how))
        line = _line(scaled[undecided], weights[undecided], logits.shape[-1])
        tokens[undecided], _ = _choose(line, total[undecided], logits.shape[-1], rest)
    return tokens


def _weights(scaled: Tensor) -> Tensor:
    """Probabilities as whole numbers, the highest 2**k, k so that a row's sum stays below 2**53."""
    bits = 52 - (scaled.shape[-1] - 1).bit_length()
    return (scaled - scaled.amax(-1, keepdim=True)).exp_().mul_(2.0**bits).round_()


def _line(scaled: Tensor, weights: Tensor, length: int) -> _Line:
    tokens = highest(scaled, min(length, scaled.shape[-1]))
    of_tokens = weights.gather(-1, tokens).double()
    return _Line(tokens, of_tokens, of_tokens.cumsum(-1))


def highest(values: Tensor, count: int) -> Tensor:
    """Ids of the highest values of each row, falling; the lower id first among equals."""
    size = values.shape[-1]
    everything = torch.arange(size, device=values.device)
    if values.is_cuda or size % _CHUNK or not 0 < count <= size // _CHUNK // 2:
        return _first(values, everything, count)
    tokens, certain = _highest_of_chunks(values, count)
    doubtful = (~certain).nonzero().flatten()
    if len(doubtful):
        tokens[doubtful] = _first(values[doubtful], everything, count)
    return tokens


def _highest_of_chunks(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Looks at the `count` chunks with the highest maxima only; what else there is can't be higher than the least
    of these. The tokens, and for which rows they are certain: where the last one is higher than that."""
    chunks = values.shape[-1] // _CHUNK
    maxima = values.reshape(-1, _CHUNK, chunks).amax(1)
    chosen = torch.as_tensor(np.argpartition(maxima.numpy(), chunks - count, axis=-1)[:, chunks - count :])
    elsewhere = maxima.gather(-1, chosen).amin(-1)
    ids = (chosen[:, None] + chunks * torch.arange(_CHUNK)[:, None]).flatten(1)
    tokens = _first(values.gather(-1, ids), ids, count)
    return tokens, values.gather(-1, tokens[:, -1:])[:, 0] > elsewhere


def _first(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """The ids of the `count` highest of these values."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 is 0.0
    # Below zero a float's bits grow as it falls: turned round they order as integers.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(torch.int64) << 32) | (_LAST_ID - ids)
    if values.is_cuda:
        first = keys.topk(count).values
    else:
        # A tenth of torch's time: NumPy orders integers with the processor's vector instructions.
        array, beyond = keys.numpy(), keys.shape[-1] - count
        if 0 < beyond < keys.shape[-1]:
            array = np.partition(array, beyond, axis=-1)
        first = torch.as_tensor(np.sort(array[:, beyond:], axis=-1)).flip(-1)
    return _LAST_ID - (first & _LAST_ID)


def _choose(line: _Line, total: Tensor, vocabulary: int, how: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens, and for which rows the line was long enough to tell."""
    length = line.sums.shape[-1]
    weights, sums, reached = line.weights, line.sums, line.sums[:, -1]
    # Nothing that could be drawn is left beyond the line.
    whole = reached == total

    limit = torch.where(how.top_k > 0, how.top_k.clamp_max(vocabulary), vocabulary)
    limited = limit <= length
    of_limit = torch.where(limited, _at(sums, limit - 1), total)
    # A token stays if those before it don't reach top-p; one more than the line has: who knows how many.
    short = (sums < (how.top_p * of_limit)[:, None]).sum(-1) + 1
    by_top_p = torch.where(how.top_p < 1, short, vocabulary)
    high = (weights >= (how.min_p * weights[:, 0])[:, None]).sum(-1)
    by_min_p = torch.where((how.min_p > 0) & (high < length), high, vocabulary)
    kept = torch.minimum(limit, torch.minimum(by_top_p, by_min_p)).clamp_min(1)
    kept = torch.where(whole, kept.clamp_max(length), kept)

    inside = kept <= length
    mass = torch.where(inside, _at(sums, kept - 1), total)
    # Below the mass: u * mass can round up to it.
    at = torch.minimum((how.uniform * mass).floor(), mass - 1)
    place = (sums <= at[:, None]).sum(-1).clamp_max(length - 1)
    untouched = (limit == vocabulary) & (how.top_p >= 1) & (by_min_p == vocabulary) & (how.min_p <= 0)
    known = limited | (limit == vocabulary) | whole
    decided = known & (inside | (untouched & (at < reached)))
    return line.tokens.gather(-1, place[:, None])[:, 0], decided


def _at(sums: Tensor, place: Tensor) -> Tensor:
    return sums.gather(-1, place.clamp(0, sums.shape[-1] - 1)[:, None])[:, 0]
