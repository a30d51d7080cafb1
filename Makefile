# Each target alone does all its set-up: it needs python3 (3.11 or newer), make, and pip's way to a package index.
#   make demo      train a dense and a pruned LeNet-5, print before and after         make demo ARGS="--sparsity 0.95"
#   make test      every test and doctest, under both Lightning names                 make test ARGS="-k pruning"
#   make check     format, lint, types, layering
#   make bench     every script in benchmarks/
#   make results   the tables of docs/results/
#   make clean     remove what the above wrote, `.venv` too

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EXTRAS := dev

.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES_OF_INSTALL := setup.py pyproject.toml constraints.txt lightning_compress/_version.py
CODE := lightning_compress recipes tests docs $(wildcard benchmarks) $(wildcard experiments) setup.py

# No test or demo may ask for a login or talk to a tracking server.
export WANDB_MODE ?= offline
export WANDB_SILENT ?= true

.PHONY: help demo test check format bench results clean

help:
	@sed -n 's/^#   make/make/p' $(firstword $(MAKEFILE_LIST))

$(STAMP): $(SOURCES_OF_INSTALL)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "constraints.txt pins versions that need Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.11")'
	@echo "Installing into $(VENV) (a few minutes, once)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# Small layers keep threads waiting for one another: to wait asleep costs nothing on idle cores, and on busy ones waiting
# awake takes several times as long.
demo results: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(STAMP)
	$(BIN)/python -m lightning_compress.recipes.demo $(ARGS)

# Two workers, one thread each: with more, the two would wait for each other's cores.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layering.py tests/test_public_names.py

format: $(STAMP)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# One after the other: two measurements at a time would measure each other.
bench: $(STAMP)
	@for script in $(wildcard benchmarks/*.py); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

results: $(STAMP)
	@for script in $(wildcard experiments/*.py); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

clean:
	rm -rf $(VENV) build dist *.egg-info outputs lightning_logs wandb checkpoints .mypy_cache .ruff_cache .pytest_cache
	find lightning_compress recipes tests benchmarks experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
