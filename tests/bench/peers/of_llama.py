"""llama.cpp as a peer: `python of_llama.py MODEL.gguf THREADS`, in an environment with llama-cpp-python.

Through its C interface, as its own `llama-batched-bench` does: the Python class above it serves one sequence.
"""

from __future__ import annotations

import ctypes
import sys
import time

import llama_cpp
import numpy as np
from cases import STEPS, serve

BATCH_TOKENS = 2048


class Llama:
    """A context of 32 sequences."""

    def __init__(self, file: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = 24_576, 32, True
        params.n_batch, params.n_ubatch = BATCH_TOKENS, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def prefill(self, prompts: list[list[int]]) -> float:
        began = time.perf_counter()
        self._read(prompts)
        seconds = time.perf_counter() - began
        self._clear()
        return seconds

    def decode(self, prompts: list[list[int]]) -> float:
        last, context = self._read(prompts), len(prompts[0])
        last = self._step(last, context)
        began = time.perf_counter()
        for step in range(STEPS):
            last = self._step(last, context + 1 + step)
        seconds = (time.perf_counter() - began) / STEPS
        self._clear()
        return seconds

    def mixed(self, prompts: list[list[int]], answer: int) -> float:
        began = time.perf_counter()
        last, context = self._read(prompts), len(prompts[0])
        for step in range(answer - 1):
            last = self._step(last, context + step)
        seconds = time.perf_counter() - began
        self._clear()
        return seconds

    def _read(self, prompts: list[list[int]]) -> list[int]:
        """All prompts; each one's first token."""
        first: list[int] = []
        for sequence, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), BATCH_TOKENS):
                part = prompt[begin : begin + BATCH_TOKENS]
                self._batch.n_tokens = len(part)
                for at, token in enumerate(part):
                    self._put(at, token, begin + at, sequence, wanted=begin + at == len(prompt) - 1)
                self._run()
            first.append(self._best(-1))
        return first

    def _step(self, last: list[int], position: int) -> list[int]:
        """One token more for each."""
        self._batch.n_tokens = len(last)
        for sequence, token in enumerate(last):
            self._put(sequence, token, position, sequence, wanted=True)
        self._run()
        return [self._best(sequence) for sequence in range(len(last))]

    def _put(self, at: int, token: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch = self._batch
        batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
        batch.seq_id[at][0], batch.logits[at] = sequence, wanted

    def _run(self) -> None:
        code = llama_cpp.llama_decode(self._context, self._batch)
        assert code == 0, f"llama_decode says {code}"

    def _best(self, at: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, at)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)


if __name__ == "__main__":
    serve(Llama(sys.argv[1], int(sys.argv[2])))
