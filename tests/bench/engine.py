"""One engine without a cluster: prompts, decoding, both mixed; what of a step is products, what is Python.

OMP_WAIT_POLICY=PASSIVE PYTHONPATH=.:proto python -m tests.bench.engine --threads 2 --weights auto,auto/int8,bf16
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from cluster.cache import cache_folder
from cluster.models.naming import resolve
from diptych.hashing import KvIdentity, granule_hashes
from diptych.types import Activations, FrontId, KvDtype, ModelSource, Request, RequestId, SamplingParams, WeightFormat
from kernels import Segment
from tests.bench.results import Figure, figure, report
from workers.engine.batch import Batch, ForwardPass
from workers.engine.engine import Engine, EngineLimits
from workers.engine.loading import load_model
from workers.engine.model import Model
from workers.engine.native_model import NativeModel
from workers.engine.sequence import Sequence
from workers.engine.weights import load_weights

PREFILLS = (16, 128, 512, 2048)
BATCHES = (1, 4, 8, 16, 32)
CONTEXTS = (128, 1024)
STEPS = 5
"""Decode steps in one measurement."""
CPU = torch.device("cpu")
Form: TypeAlias = str
"""A weight format, with activations behind a stroke where they aren't bf16 (auto/int8); or torch. Behind a plus the
cache's numbers, where they aren't bf16 (auto+fp8)."""
ROOT = KvIdentity(model_digest="bench", weight_format="any", kv_dtype="bf16").root()
_numbers = itertools.count()


@dataclass(slots=True)
class Clock:
    """Adds up what is measured, by wall and by the processor time of the thread that asks and of all threads."""

    wall: float = 0.0
    thread: float = 0.0
    process: float = 0.0

    def measure(self, work: Callable[[], Any]) -> Any:
        wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
        try:
            return work()
        finally:
            self.wall += time.perf_counter() - wall
            self.thread += time.thread_time() - thread
            self.process += time.process_time() - process


class Timed:
    """The C++ library, with a clock around its calls."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.clock = Clock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)
        return lambda *arguments: self.clock.measure(lambda: function(*arguments))


class Rig:
    """An engine in one format."""

    def __init__(self, source: ModelSource, form: Form, threads: int) -> None:
        self.form, cache = form, cache_folder() / "weights"
        self.model: ForwardPass
        form, _, kv = form.partition("+")
        if form == "torch":
            weights = load_weights(source, "bf16", cache=cache)
            self.model, self.how = Model(weights, max_context=weights.config.context, device=CPU), "torch, as it comes"
        else:
            weights_form, _, activations = form.partition("/")
            self.model, self.how = load_model(
                source,
                "bf16",
                cast("WeightFormat", weights_form),
                cache=cache,
                device=CPU,
                threads=threads,
                activations=cast("Activations", activations or "bf16"),
            )
        limits = EngineLimits(block_size=16, blocks=2200, max_batch_tokens=2048, max_running=64, max_context=4096)
        self.engine = Engine(self.model, limits, dtype=cast("KvDtype", kv or "bf16"), device=CPU)
        random = torch.Generator().manual_seed(0)
        for part in self.engine.arena.split(100):
            part.copy_(torch.empty(part.shape).normal_(std=0.5, generator=random))
        self.inside: Timed | None = None
        if isinstance(self.model, NativeModel):
            decoder: Any = self.model._decoder
            self.inside = decoder._library = Timed(decoder._library)

    def sequence(self, prompt: int, answer: int, task: Any = "answer") -> Sequence:
        number = next(_numbers)
        tokens = tuple(random.Random(number).choices(range(300, 40_000), k=prompt))
        request = Request(
            id=RequestId(f"r{number}"),
            front=FrontId("bench"),
            tokens=tokens,
            granules=granule_hashes(tokens, ROOT),
            root=ROOT,
            params=SamplingParams(max_tokens=answer, temperature=0.0, seed=1),
        )
        return Sequence(request=request, attempt=0, task=task, arrival=number, block_size=16)

    def prefill(self, tokens: int) -> Clock:
        sequence, clock = self.sequence(tokens, 4), Clock()
        self.engine.add(sequence)
        clock.measure(self.engine.step)
        self.engine.drop(sequence)
        self.engine.pool.clear()
        return clock

    def decoding(self, batch: int, context: int) -> list[Sequence]:
        """As after a hand-off: the KV is there, whatever it is."""
        sequences = [self.sequence(context, 1000, "decode") for _ in range(batch)]
        for sequence in sequences:
            self.engine.add(sequence)
        self.engine.plan()
        for sequence in sequences:
            self.engine.join(sequence, 1)
        return sequences

    def decode(self, batch: int, context: int) -> Clock:
        """`STEPS` steps of it, the first one apart."""
        sequences, clock = self.decoding(batch, context), Clock()
        self.engine.step()
        if self.inside:
            self.inside.clock = Clock()
        for _ in range(STEPS):
            clock.measure(self.engine.step)
        self.end(sequences)
        return clock

    def mixed(self, requests: int, prompt: int, answer: int) -> Clock:
        """All at once, until the last has its last token."""
        sequences, clock = [self.sequence(prompt, answer) for _ in range(requests)], Clock()

        def serve() -> None:
            for sequence in sequences:
                self.engine.add(sequence)
            while self.engine.has_work:
                for sampled in self.engine.step().sampled:
                    if sampled.finish:
                        self.engine.drop(sampled.sequence)

        clock.measure(serve)
        self.engine.pool.clear()
        return clock

    def end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.engine.drop(sequence)
        self.engine.pool.clear()

    def products(self, rows: int, wanted: int) -> Clock | None:
        """The matrix products of such a step alone."""
        if not isinstance(self.model, NativeModel):
            return None
        clock, native = Clock(), self.model
        batch = Batch(tokens=[1] * rows, segments=[Segment(0, rows, range(rows))], decode_rows=0, wanted=range(wanted))
        arena: Tensor = self.engine.arena
        clock.measure(lambda: native.products(batch, arena))
        return clock


class Measured(defaultdict[tuple[str, str, str], list[float]]):
    """(case, metric, unit) → what was measured."""

    def __init__(self) -> None:
        super().__init__(list)

    def note(self, case: str, tokens: int, steps: int, clock: Clock) -> None:
        self[case, "rate", "tokens/s"].append(tokens * steps / clock.wall)
        self[case, "step", "ms"].append(clock.wall / steps * 1e3)
        self[case, "step, processor time of all threads", "ms"].append(clock.process / steps * 1e3)

    def figures(self) -> list[Figure]:
        return [figure(case, metric, unit, values) for (case, metric, unit), values in self.items()]


def measure_prefill(rig: Rig, tokens: int, to: Measured) -> None:
    case = f"prefill {tokens}, {rig.form}"
    clock, products = rig.prefill(tokens), rig.products(tokens, 1)
    to.note(case, tokens, 1, clock)
    if products:
        to[case, "products alone / step", "ratio"].append(products.wall / clock.wall)
        to[case, "products alone / step, processor time", "ratio"].append(products.process / clock.process)


def measure_decode(rig: Rig, batch: int, context: int, to: Measured) -> None:
    case = f"decode {batch} at {context}, {rig.form}"
    clock = rig.decode(batch, context)
    to.note(case, batch, STEPS, clock)
    if not rig.inside:
        return
    outside = 1 - rig.inside.clock.thread / clock.thread
    to[case, "outside C++ / step, processor time of its thread", "ratio"].append(outside)
    products = [each for _ in range(STEPS) if (each := rig.products(batch, batch))]
    to[case, "products alone / step", "ratio"].append(sum(each.wall for each in products) / clock.wall)
    used = sum(each.process for each in products)
    to[case, "products alone / step, processor time", "ratio"].append(used / clock.process)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--model", default="smollm2-135m-instruct")
    asked.add_argument("--weights", default="auto,auto/int8,bf16", help="formats, as in auto,int8/int8,auto+fp8,torch")
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--only", default="", help="cases that begin so: prefill, decode 8, mixed")
    given = asked.parse_args()
    torch.set_num_threads(given.threads)
    rigs = [Rig(resolve(given.model, progress=print), form, given.threads) for form in given.weights.split(",")]
    for rig in rigs:
        print(f"{rig.form}: {rig.how}")
    found = Measured()
    for _ in range(given.rounds):
        for rig in rigs:
            for tokens in PREFILLS:
                if f"prefill {tokens}".startswith(given.only):
                    measure_prefill(rig, tokens, found)
            for batch, context in itertools.product(BATCHES, CONTEXTS):
                if f"decode {batch} at {context}".startswith(given.only):
                    measure_decode(rig, batch, context, found)
            if "mixed".startswith(given.only) or given.only == "mixed":
                found.note(f"mixed 16 x 512 to 64, {rig.form}", 16 * 64, 1, rig.mixed(16, 512, 64))
    report("engine", found.figures())


if __name__ == "__main__":
    main()
