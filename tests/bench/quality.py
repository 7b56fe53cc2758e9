"""What each way to compute, each weight format and a KV cache in fp8 cost in quality: perplexity on a fixed text,
choices beside fp32's.

PYTHONPATH=.:proto python -m tests.bench.quality --only "KV fp8"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cluster.cache import cache_folder
from cluster.front.tokenizer import TextModel
from cluster.models.naming import resolve
from diptych.types import ModelSource, WeightFormat
from kernels import Segment
from kernels.cpu.library import load_library
from kernels.cpu.products import reason_against_int8
from tests.bench.results import Figure, figure, report
from tests.e2e.exact.test_wire import TEXT
from workers.engine.batch import Batch, ForwardPass
from workers.engine.model import Model
from workers.engine.native_model import NativeModel
from workers.engine.packed_weights import pack_weights
from workers.engine.weights import Weights, load_weights

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn
FORMATS: tuple[WeightFormat, ...] = ("bf16", "int8", "int4")


class Way(NamedTuple):
    """One way to compute the model."""

    name: str
    model: ForwardPass
    kv: torch.dtype


def ways(source: ModelSource) -> Iterator[Way]:
    """fp32 first, which the others are held to."""
    cache = cache_folder() / "weights"
    exact = load_weights(source, "fp32", cache=cache)
    context = exact.config.context
    in_fp32 = Model(exact, max_context=context, device=CPU)
    yield Way("torch, fp32", in_fp32, torch.float32)
    yield Way("torch, fp32, KV fp8", in_fp32, FP8)
    weights = load_weights(source, "bf16", cache=cache)
    in_bf16 = Model(weights, max_context=context, device=CPU)
    yield Way("torch, bf16", in_bf16, torch.bfloat16)
    yield Way("torch, bf16, KV fp8", in_bf16, FP8)
    library = load_library(cache)

    def native(name: str, of: Weights, form: WeightFormat) -> Iterator[Way]:
        packed = pack_weights(library, of, form, None)
        model = NativeModel(library, of, packed, max_context=context, threads=1)
        yield Way(name, model, torch.bfloat16)
        yield Way(f"{name}, KV fp8", model, FP8)
        if form == "bf16" or reason_against_int8(library):
            return
        model = NativeModel(library, of, packed, max_context=context, threads=1, activations="int8")
        yield Way(f"{name}, activations int8", model, torch.bfloat16)
        yield Way(f"{name}, activations int8, KV fp8", model, FP8)

    yield from native("C++, the file's own bits", weights, "auto")
    # As if the file had bf16 only.
    plain = replace(weights, quantised=dict)
    for form in FORMATS:
        yield from native(f"C++, {form} from bf16", plain, form)


def said(way: Way, tokens: list[int]) -> Tensor:
    """Every position's logits: [tokens, vocabulary]"""
    config, blocks = way.model.config, range(-(-len(tokens) // 256) * 16)
    arena = torch.zeros((len(blocks), config.layers, 2, config.kv_heads, 16, config.head_dim), dtype=way.kv)
    batch = Batch(tokens=tokens, segments=[Segment(0, len(tokens), blocks)], decode_rows=0, wanted=range(len(tokens)))
    return way.model.forward(batch, arena).values


def figures(way: Way, logits: Tensor, exact: Tensor, tokens: list[int]) -> Iterator[Figure]:
    of_next, said_exactly = logits[:-1].log_softmax(-1), exact[:-1].log_softmax(-1)
    loss = functional.nll_loss(of_next, torch.tensor(tokens[1:]))
    yield figure(way.name, "perplexity", "", [float(loss.exp())])
    exact_loss = functional.nll_loss(said_exactly, torch.tensor(tokens[1:]))
    yield figure(way.name, "perplexity beside fp32's", "%", [float((loss - exact_loss).exp() - 1) * 100])
    yield figure(
        way.name, "choices equal to fp32's", "%", [float((logits.argmax(-1) == exact.argmax(-1)).float().mean()) * 100]
    )
    apart = functional.kl_div(of_next, said_exactly, log_target=True, reduction="batchmean")
    yield figure(way.name, "divergence from fp32", "nats", [float(apart)])


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--model", default="smollm2-135m-instruct")
    asked.add_argument("--only", default="", help="a part of the name of those to compute; fp32 is, in any case")
    told = asked.parse_args()
    source = resolve(told.model, progress=print)
    tokens = list(TextModel.load(source).encode(TEXT))
    found: list[Figure] = []
    exact: Tensor | None = None
    for way in ways(source):
        if exact is not None and told.only not in way.name:
            continue
        logits = said(way, tokens)
        exact = logits if exact is None else exact
        found += figures(way, logits, exact, tokens)
    report("quality", found)
    print(f"{len(tokens)} tokens")


if __name__ == "__main__":
    main()
