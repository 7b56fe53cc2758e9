"""The engine on a GPU beside what the hardware allows, and beside transformers (issue 7, must show 7).

PYTHONPATH=.:proto python -m tests.gpu.bench_engine   prints a table and one JSON object a row

What the hardware allows is measured in the same run: a copy on the device (bytes read and written) and
a square bf16 product of random numbers. Every part runs, whatever became of the others; the exit status
is 1 when a part broke or a figure is below its bar. `--small` runs all of it in seconds, on a CPU in
Triton's interpreter too, and shows that it works, not how fast.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from diptych.types import ModelSource
from kernels import Segment
from kernels.gpu.attention import Attention
from kernels.gpu.decode_attention import decode_attention, split_count
from kernels.gpu.flashinfer_attention import flashinfer_attention, reason_against
from kernels.gpu.paged import Look, PagedRows
from kernels.gpu.triton_attention import triton_attention
from workers.engine.batch import Batch
from workers.engine.model_config import ModelConfig
from workers.engine.triton_model import TritonModel
from workers.engine.weights import Weights, load_weights

BLOCK = 16
BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured."""

    shape: str
    repeats: int
    copied_bytes: int
    product: int
    """Rows, columns and depth of the product."""
    decodes: tuple[tuple[int, int], ...]
    """(rows, keys of each)"""
    prefills: tuple[int, ...]
    attentions: tuple[tuple[int, int], ...]
    """(rows, keys of each), one layer alone."""


FULL = Sizes(
    shape="llama-8b",
    repeats=30,
    copied_bytes=4 << 30,
    product=8192,
    decodes=((1, 128), (1, 1024), (8, 1024), (64, 1024)),
    prefills=(512, 2048, 8192),
    attentions=((64, 1024), (8, 8192), (1, 65536)),
)
SMALL = Sizes(
    shape="tiny-llama",
    repeats=2,
    copied_bytes=1 << 20,
    product=64,
    decodes=((1, 40), (4, 24)),
    prefills=(40,),
    attentions=((2, 64),),
)
BARS = {"decode 1 at 128": 0.80, "decode 64 at 1024": 0.65, "prefill 2048": 0.60, "prefill 8192": 0.60}
ATTENTION_BAR = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The median of some measurements, how far they lie apart, and what the hardware would allow."""

    case: str
    milliseconds: float
    low: float
    high: float
    n: int
    share: float | None = None
    """Of what the hardware allows."""
    bar: float | None = None
    note: str = ""

    @property
    def is_below(self) -> bool:
        return self.bar is not None and (self.share is None or self.share < self.bar)


def row(case: str, times: Sequence[float], bound: float | None = None, bar: float | None = None, note: str = "") -> Row:
    """times, bound: in milliseconds; the bound is the least time possible."""
    middle = median(times)
    share = None if bound is None else bound / middle
    return Row(
        case=case, milliseconds=middle, low=min(times), high=max(times), n=len(times), share=share, bar=bar, note=note
    )


@dataclass(slots=True)
class Bench:
    """A device, its measured limits, and what was found so far."""

    device: torch.device
    sizes: Sizes
    rows: list[Row] = field(default_factory=list[Row])
    broken: list[str] = field(default_factory=list[str])
    bytes_a_second: float = 0.0
    flops_a_second: float = 0.0

    def add(self, found: Row) -> None:
        self.rows.append(found)
        print(json.dumps(asdict(found)), flush=True)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """What breaks is told, at once and at the end."""
        try:
            work()
        except Exception:
            self.broken.append(name)
            traceback.print_exc()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def times(self, work: Callable[[], object], *, wall: bool = False) -> list[float]:
        """Milliseconds of each call: of the device, or of all until the device is done."""
        for _ in range(3):
            work()
        on_device = self.device.type == "cuda" and not wall
        return [self._by_events(work) if on_device else self._by_clock(work) for _ in range(self.sizes.repeats)]

    def _by_events(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _by_clock(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bound_of(self, nbytes: float) -> float:
        """Milliseconds to move so many bytes at the rate of a copy."""
        return nbytes / self.bytes_a_second * 1e3


# ---- what the hardware allows ---------------------------------------------------------------------------------


def measure_limits(bench: Bench) -> None:
    source = torch.randn(bench.sizes.copied_bytes // 4, device=bench.device)
    target = torch.empty_like(source)
    times = bench.times(partial(target.copy_, source))
    bench.bytes_a_second = 2 * source.nbytes / median(times) * 1e3
    bench.add(row("copy", times, note=f"{bench.bytes_a_second / 1e12:.2f} TB/s"))
    del source, target
    size = bench.sizes.product
    left, right = (torch.randn(size, size, device=bench.device).to(torch.bfloat16) for _ in range(2))
    times = bench.times(partial(torch.matmul, left, right))
    bench.flops_a_second = 2 * size**3 / median(times) * 1e3
    bench.add(row(f"product {size}", times, note=f"{bench.flops_a_second / 1e12:.0f} TFLOP/s"))


# ---- the engine --------------------------------------------------------------------------------------------


class Rig:
    """A model and an arena full of random keys."""

    def __init__(self, bench: Bench, model: TritonModel) -> None:
        self.model, config, sizes = model, model.config, bench.sizes
        most = max(*(rows * (keys + BLOCK) for rows, keys in sizes.decodes), *sizes.prefills)
        shape = (-(-most // BLOCK) + 1, config.layers, 2, config.kv_heads, BLOCK, config.head_dim)
        self.arena = torch.empty(shape, dtype=torch.bfloat16, device=bench.device).normal_(std=0.5)

    def decode(self, rows: int, keys: int) -> Batch:
        """The last of `keys` tokens of each sequence."""
        return self._batch([Segment(keys - 1, 1, blocks) for blocks in self._tables(rows, keys)], rows)

    def prompt(self, tokens: int) -> Batch:
        return self._batch([Segment(0, tokens, blocks) for blocks in self._tables(1, tokens)], 0)

    def forward(self, batch: Batch) -> None:
        said = self.model.forward(batch, self.arena)
        assert said.finite.all(), "the logits are not finite"

    def _batch(self, segments: list[Segment], decode_rows: int) -> Batch:
        count = sum(segment.count for segment in segments)
        tokens = torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        wanted = range(decode_rows) if decode_rows else [count - 1]
        return Batch(tokens=tokens, segments=segments, decode_rows=decode_rows, wanted=list(wanted))

    def _tables(self, rows: int, tokens: int) -> Iterator[list[int]]:
        """Blocks in no order, as they come after some hours of serving."""
        each = -(-tokens // BLOCK)
        order = torch.randperm(len(self.arena), generator=torch.Generator().manual_seed(1)).tolist()
        return (order[at * each : (at + 1) * each] for at in range(rows))


def read_bytes(config: ModelConfig, rows: int, keys: int, weight_bytes: float = BF16_BYTES) -> float:
    """The least a decode step reads: every weight but the embedding's other rows, and the keys and values.

    weight_bytes: of a number in a layer's product; the head is bf16"""
    head = config.vocabulary * config.hidden
    layers = config.parameters - head * (1 if config.tied else 2)
    cached = rows * keys * config.layers * 2 * config.kv_heads * config.head_dim
    return layers * weight_bytes + (head + cached) * BF16_BYTES


def prompt_flops(config: ModelConfig, tokens: int) -> float:
    """What a prompt needs, not what is done: no masked scores, and of the last layer only the last token's rest."""
    attention = config.heads * config.head_dim
    qkv = config.hidden * (attention + 2 * config.kv_heads * config.head_dim)
    rest = config.hidden * (attention + 3 * config.intermediate)
    products = config.layers * tokens * qkv + ((config.layers - 1) * tokens + 1) * rest
    products += config.hidden * config.vocabulary
    return 2 * products + config.layers * 2 * attention * tokens * (tokens + 1)


def measure_engine(bench: Bench, weights: Weights) -> None:
    config = weights.config
    build = partial(TritonModel, weights, max_context=config.context, device=bench.device)
    on_gpu = bench.device.type == "cuda"
    rig = Rig(bench, build(graphs=on_gpu))
    for rows, keys in bench.sizes.decodes:
        case = f"decode {rows} at {keys}"
        bound = bench.bound_of(read_bytes(config, rows, keys))
        times = bench.times(partial(rig.forward, rig.decode(rows, keys)), wall=True)
        bench.add(row(case, times, bound, BARS.get(case), note="whole step, by the clock"))
    for tokens in bench.sizes.prefills:
        case = f"prefill {tokens}"
        bound = prompt_flops(config, tokens) / bench.flops_a_second * 1e3
        times = bench.times(partial(rig.forward, rig.prompt(tokens)), wall=True)
        bench.add(row(case, times, bound, BARS.get(case), note=f"{tokens / median(times) * 1e3:.0f} tokens/s"))
    rig.model = build(graphs=False)
    rows, keys = bench.sizes.decodes[0]
    times = bench.times(partial(rig.forward, rig.decode(rows, keys)), wall=True)
    bench.add(row(f"decode {rows} at {keys}, no graphs", times, bench.bound_of(read_bytes(config, rows, keys))))


def measure_flashinfer(bench: Bench, weights: Weights) -> None:
    """Prompts by FlashInfer's attention, where it is installed."""
    config = weights.config
    if reason := reason_against(config.head_dim, torch.bfloat16, bench.device):
        print(f"no prompts by FlashInfer: {reason}", file=sys.stderr)
        return
    theirs = flashinfer_attention(config.heads // config.kv_heads, config.head_dim, bench.device)
    attention = Attention(triton_attention(bench.device).decode, theirs.prefill)
    rig = Rig(bench, TritonModel(weights, max_context=config.context, device=bench.device, attention=attention))
    for tokens in bench.sizes.prefills:
        bound = prompt_flops(config, tokens) / bench.flops_a_second * 1e3
        times = bench.times(partial(rig.forward, rig.prompt(tokens)), wall=True)
        bench.add(
            row(f"prefill {tokens}, flashinfer", times, bound, note=f"{tokens / median(times) * 1e3:.0f} tokens/s")
        )


def measure_eight_bits(bench: Bench, weights: Weights, bits: Any) -> None:
    config = weights.config
    on_gpu = bench.device.type == "cuda"
    model = TritonModel(weights, max_context=config.context, device=bench.device, bits=bits, graphs=on_gpu)
    rig = Rig(bench, model)
    for rows, keys in (bench.sizes.decodes[0], bench.sizes.decodes[-1]):
        bound = bench.bound_of(read_bytes(config, rows, keys, weight_bytes=1))
        times = bench.times(partial(rig.forward, rig.decode(rows, keys)), wall=True)
        bench.add(row(f"decode {rows} at {keys}, {bits} weights", times, bound))


def measure_attention(bench: Bench, config: ModelConfig) -> None:
    """Decode attention alone, in graphs as in the engine."""
    for rows, keys in bench.sizes.attentions:
        nbytes = rows * keys * 2 * config.kv_heads * config.head_dim * BF16_BYTES
        splits = split_count(rows, config.kv_heads, _processors(bench.device))
        times = bench.times(_as_graph(bench, _attention(bench, config, rows, keys, splits)))
        note = f"{nbytes / 1e6:.0f} MB, {splits} splits"
        bar = ATTENTION_BAR if bench.sizes is FULL else None
        times = [each / _LAYERS for each in times]
        bench.add(row(f"attention {rows} at {keys}", times, bench.bound_of(nbytes), bar, note))


_LAYERS = 4
"""In one measurement, so that what the last call read is not what the next one finds in the cache."""


def _attention(bench: Bench, config: ModelConfig, rows: int, keys: int, splits: int) -> Callable[[], None]:
    each = -(-keys // BLOCK)
    shape = (rows * each, _LAYERS, 2, config.kv_heads, BLOCK, config.head_dim)
    arena = torch.empty(shape, dtype=torch.bfloat16, device=bench.device).normal_()
    query = torch.randn(rows, config.heads, config.head_dim, device=bench.device).to(torch.bfloat16)
    where = PagedRows(
        positions=torch.full((rows,), keys - 1, dtype=torch.int32, device=bench.device),
        starts=torch.arange(0, rows * each, each, dtype=torch.int32, device=bench.device),
        ids=torch.randperm(rows * each).to(bench.device, torch.int32),
    )

    def all_layers() -> None:
        for layer in range(_LAYERS):
            decode_attention(query, arena[:, layer], where, Look(config.attention_scale), splits)

    return all_layers


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _as_graph(bench: Bench, work: Callable[[], None]) -> Callable[[], None]:
    """Launches cost nothing to the device in a graph, as in the engine."""
    if bench.device.type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


# ---- transformers ------------------------------------------------------------------------------------------


def measure_transformers(bench: Bench, config: ModelConfig) -> None:
    import transformers

    attention = _fastest_attention()
    settings = transformers.LlamaConfig(
        hidden_size=config.hidden, intermediate_size=config.intermediate, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        vocab_size=config.vocabulary, max_position_embeddings=config.context, tie_word_embeddings=config.tied,
        attn_implementation=attention,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bench.device:
            model: Any = transformers.LlamaForCausalLM(settings).eval()
    finally:
        torch.set_default_dtype(before)
    note = f"transformers {transformers.__version__}, {attention}"

    @torch.inference_mode()
    def prefill(tokens: int) -> None:
        model(_some_tokens(bench, 1, tokens), use_cache=True, logits_to_keep=1)

    for tokens in bench.sizes.prefills:
        bench.add(row(f"transformers, prefill {tokens}", bench.times(partial(prefill, tokens), wall=True), note=note))

    for rows, keys in (bench.sizes.decodes[0], bench.sizes.decodes[-1]):
        with torch.inference_mode():
            cache = model(_some_tokens(bench, rows, keys - 1), use_cache=True, logits_to_keep=1).past_key_values

        @torch.inference_mode()
        def step(rows: int = rows, cache: Any = cache) -> None:
            model(_some_tokens(bench, rows, 1), past_key_values=cache, use_cache=True).logits.argmax(-1).tolist()
            cache.crop(-1)

        bench.add(row(f"transformers, decode {rows} at {keys}", bench.times(step, wall=True), note=note))
        del cache, step


def _fastest_attention() -> str:
    """Of those that this machine has."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def _some_tokens(bench: Bench, rows: int, count: int) -> Tensor:
    return torch.randint(0, 300, (rows, count), device=bench.device)


# ---- all of it ---------------------------------------------------------------------------------------------


def run(bench: Bench) -> int:
    """The exit status."""
    source = ModelSource(name=bench.sizes.shape, path=f"random:{bench.sizes.shape}", digest="0123456789abcdef")
    bench.part("limits", lambda: measure_limits(bench))
    if bench.broken:
        return _told(bench)  # there is nothing to compare with
    weights = load_weights(source, "bf16", cache=None)
    bench.part("attention", lambda: measure_attention(bench, weights.config))
    bench.part("engine", lambda: measure_engine(bench, weights))
    bench.part("flashinfer", lambda: measure_flashinfer(bench, weights))
    for bits in ("int8", "fp8"):
        bench.part(f"{bits} weights", lambda bits=bits: measure_eight_bits(bench, weights, bits))
    bench.part("transformers", lambda: measure_transformers(bench, weights.config))
    return _told(bench)


def _told(bench: Bench) -> int:
    print(f"\n{'case':<40}{'ms':>10}{'low':>10}{'high':>10}{'n':>4}{'share':>8}{'bar':>6}  note")
    for one in bench.rows:
        share = "" if one.share is None else f"{one.share:.2f}"
        bar = "" if one.bar is None else f"{one.bar:.2f}"
        mark = "BELOW ITS BAR " if one.is_below else ""
        numbers = "".join(f"{number:>10.3f}" for number in (one.milliseconds, one.low, one.high))
        print(f"{one.case:<40}{numbers}{one.n:>4}{share:>8}{bar:>6}  {mark}{one.note}")
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.machine()
    print(f"\n{name}, torch {torch.__version__}, {platform.python_version()}")
    below = [one.case for one in bench.rows if one.is_below]
    for what, names in (("BROKEN", bench.broken), ("BELOW ITS BAR", below)):
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return 1 if bench.broken or below else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes, and figures without meaning")
    small = parser.parse_args(arguments).small
    if not small and not torch.cuda.is_available():
        print("no CUDA GPU here: --small shows that the benchmark works", file=sys.stderr)
        return 1
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return run(Bench(device, SMALL if small else FULL))


if __name__ == "__main__":
    sys.exit(main())
