"""vLLM as a peer, its engine in this process: `python of_vllm.py MODEL_FOLDER THREADS`, in vLLM's environment."""

from __future__ import annotations

import itertools
import os
import sys
import time

os.environ |= {
    "OMP_NUM_THREADS": sys.argv[2],
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from cases import STEPS, serve
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


class Vllm:
    """bf16, compiled as it comes."""

    def __init__(self, folder: str) -> None:
        self._engine = LLM(
            model=folder,
            dtype="bfloat16",
            max_model_len=4096,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_batched_tokens=2048,
            max_num_seqs=64,
        ).llm_engine
        self._numbers = itertools.count()

    def prefill(self, prompts: list[list[int]]) -> float:
        self._add(prompts, 1)
        return self._finish()

    def decode(self, prompts: list[list[int]]) -> float:
        self._add(prompts, STEPS + 40)
        said: dict[str, int] = {}
        while len(said) < len(prompts) or min(said.values()) < 2:
            for output in self._engine.step():
                said[output.request_id] = len(output.outputs[0].token_ids)
        began = time.perf_counter()
        for _ in range(STEPS):
            self._engine.step()
        seconds = (time.perf_counter() - began) / STEPS
        self._engine.abort_request(list(said))
        self._finish()
        return seconds

    def mixed(self, prompts: list[list[int]], answer: int) -> float:
        self._add(prompts, answer)
        return self._finish()

    def _add(self, prompts: list[list[int]], answer: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self._engine.add_request(f"r{next(self._numbers)}", TokensPrompt(prompt_token_ids=prompt), params)

    def _finish(self) -> float:
        began = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - began


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    engine = Vllm(sys.argv[1])
    sys.stdout = answers
    serve(engine)
