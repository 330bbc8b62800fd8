# `make demo` and `make test` set up their own environment the first time.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TRANSFORMERS_VERBOSITY ?= error
export DIFFUSERS_VERBOSITY ?= error
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-ci test-all check slurm gpu clean

.venv/ready: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation deepspeed --constraint constraints.txt
	touch $@

# One process needs no launcher, whose own start takes seconds.
demo: .venv/ready
	$(BIN)/python launch/nft.py recipes/shapes/aesthetic.yaml out=runs/demo-full
	$(BIN)/python launch/nft.py recipes/shapes/stopped.yaml out=runs/demo-stopped
	$(BIN)/python -m nft.evaluation.summary runs/demo-full runs/demo-stopped

# Files are dealt out whole, in order: the longest ones, which start several processes, come first.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/ready check
	$(PYTEST) -m "not slow"

# Several processes, every signal, repeated kills, and SLURM where it can be installed.
test-ci: .venv/ready check slurm
	$(PYTEST) -m "not exhaustive"

# The same on more backends, models, and recipes.
test-all: .venv/ready check slurm
	$(PYTEST)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A scheduler for tests/slurm, which are skipped where this cannot install it.
slurm:
	@PATH="$$PATH:/usr/sbin:/sbin"; command -v slurmctld >/dev/null && command -v munged >/dev/null || { timeout 120 apt-get update && \
		DEBIAN_FRONTEND=noninteractive timeout 180 apt-get install --yes --no-install-recommends slurm-wlm munge; \
	} >/dev/null 2>&1 || echo "slurm-wlm and munge could not be installed: tests/slurm will be skipped"

# Everything that only a GPU can prove, on one card and offline; on a CPU the same steps at the miniature's shapes. It uses
# the packages of PYTHON's environment, where a GPU's torch usually is, and says what is missing there.
gpu:
	$(PYTHON) -m tests.gpu

clean:
	rm -rf .venv runs build *.egg-info
