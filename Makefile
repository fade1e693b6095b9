# Every target does its own set-up: the first one run makes .venv and installs into it.
.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-hosts soak bench bench-gpu check format tensorboard clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH := .venv-bench
PEERS := $(BENCH)/.installed
# With more in sight, the peers' trainer would copy its model to all of them.
ONE_GPU = CUDA_VISIBLE_DEVICES=$$(echo $${CUDA_VISIBLE_DEVICES:-0} | cut -d, -f1) $(BENCH)/bin/python

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp comes last: a killed install is done again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

# The peers that benches measure against, in an environment of their own.
$(PEERS): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--requirement benchmarks/requirements.txt --editable .
	@touch $@

demo: $(INSTALLED) ## the whole main job on shipped data, on two CPU cores, in minutes
	$(BIN)/python benchmarks/demo.py

test: $(INSTALLED) ## the tests that need neither a GPU nor root
	$(BIN)/python -m pytest

test-gpu: $(INSTALLED) ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

test-hosts: $(INSTALLED) ## two hosts in network namespaces: needs root, iproute2, openssh-server, pdsh
	$(BIN)/python -m pytest -m hosts

soak: $(INSTALLED) ## kill a small run at 20 moments; it must end as one never killed
	$(BIN)/python tests/soak.py --kills 20

bench: $(PEERS) ## all benches on this CPU, beside their peers; appends to benchmarks/RESULTS.md; about two hours
	$(BENCH)/bin/python -m benchmarks.bench_logprob
	$(BENCH)/bin/python -m benchmarks.bench_train
	$(BENCH)/bin/python -m benchmarks.bench_reference
	$(BENCH)/bin/python -m benchmarks.bench_scale
	$(BENCH)/bin/python -m benchmarks.bench_block

bench-gpu: $(PEERS) ## the same on an NVIDIA GPU, with models of about a billion weights
	$(ONE_GPU) -m benchmarks.bench_logprob --device cuda
	$(ONE_GPU) -m benchmarks.bench_train --device cuda --shape 1.3b --settings bf16 autocast
	$(ONE_GPU) -m benchmarks.bench_train --device cuda --shape llama-3.2-1b --settings bf16 autocast
	$(ONE_GPU) -m benchmarks.bench_reference --device cuda --shape 1.3b --pairs 1024 --settings bf16 autocast
	$(BENCH)/bin/python -m benchmarks.bench_scale --device cuda

check: $(INSTALLED) ## format, lint, types, import floors
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED) ## rewrite the files as `make check` wants them
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

tensorboard: $(INSTALLED) ## curves of all runs, on http://localhost:6006
	$(BIN)/tensorboard --logdir runs --host localhost

clean: ## remove both environments and all caches; runs and checkpoints stay
	rm -rf $(VENV) $(BENCH) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
