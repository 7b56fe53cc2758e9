"""Our engine as a peer, as one `mixed` worker has it: `python -m tests.bench.peers.of_ours FORM THREADS`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch

from cluster.models.naming import resolve
from tests.bench.engine import Rig
from tests.bench.peers.cases import STEPS, serve

if TYPE_CHECKING:
    from workers.engine.sequence import Sequence


class Ours:
    """`form`: bf16, or auto (the file's own bits)."""

    def __init__(self, form: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._rig = Rig(resolve("smollm2-135m-instruct", progress=lambda _: None), form, threads)  # pyright: ignore
        self._engine = self._rig.engine

    def prefill(self, prompts: list[list[int]]) -> float:
        sequences = self._add(prompts, 4)
        began, waiting = time.perf_counter(), len(sequences)
        while waiting:
            waiting -= len(self._engine.step().sampled)
        seconds = time.perf_counter() - began
        self._rig.end(sequences)
        return seconds

    def decode(self, prompts: list[list[int]]) -> float:
        sequences = self._add(prompts, 1000)
        while any(each.generated < 2 for each in sequences):
            self._engine.step()
        began = time.perf_counter()
        for _ in range(STEPS):
            self._engine.step()
        seconds = (time.perf_counter() - began) / STEPS
        self._rig.end(sequences)
        return seconds

    def mixed(self, prompts: list[list[int]], answer: int) -> float:
        began, said = time.perf_counter(), 0
        self._add(prompts, answer)
        while self._engine.has_work:
            for sampled in self._engine.step().sampled:
                said += 1
                if sampled.finish:
                    self._engine.drop(sampled.sequence)
        seconds = time.perf_counter() - began
        assert said == len(prompts) * answer, f"{said} tokens came"
        self._engine.pool.clear()
        return seconds

    def _add(self, prompts: list[list[int]], answer: int) -> list[Sequence]:
        sequences = [self._rig.sequence(len(prompt), answer) for prompt in prompts]
        for sequence in sequences:
            self._engine.add(sequence)
        return sequences


if __name__ == "__main__":
    serve(Ours(sys.argv[1], int(sys.argv[2])))
