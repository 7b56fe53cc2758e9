"""From logits to tokens with one uniform each: inverse-CDF sampling. Knows no request.

A token is chosen by its own row, parameters and uniform only, so a batch chooses what single
rows would.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """logits: [rows, vocabulary] fp32 → token ids [rows].

    temperature: [rows], 0 is greedy (ties: lowest id)  top_k: [rows], 0 is no limit
    top_p: [rows] in (0, 1]  uniform: [rows] fp64 in [0, 1)

    The order is temperature, top-k, top-p, as in `transformers`. The kept tokens are laid on the
    line by falling probability and the one under `uniform` is taken.
    """
    tokens = logits.argmax(-1)
    drawn: list[int] = (temperature > 0).nonzero().flatten().tolist()  # pyright: ignore
    for row in drawn:  # each row alone: its bits can't depend on the batch
        tokens[row] = _draw(logits[row], temperature[row], int(top_k[row]), float(top_p[row]), float(uniform[row]))
    return tokens


def _draw(logits: Tensor, temperature: Tensor, top_k: int, top_p: float, uniform: float) -> Tensor:
    values, ids = torch.sort(logits / temperature, descending=True, stable=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    line = torch.softmax(values.double(), dim=-1).cumsum(-1)
    if top_p < 1.0:
        # The smallest set that reaches top_p: a token stays if those before it don't reach it.
        kept = 1 + int((line[:-1] < top_p).sum())
        line, ids = line[:kept], ids[:kept]
    at = torch.searchsorted(line, uniform * line[-1], right=True)
    return ids[at.clamp_max(len(ids) - 1)]
