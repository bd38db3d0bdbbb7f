# One command from nothing: each target makes .venv, installs what it needs into it, and runs.
#
#   make demo     train a small language model                make lint     format check, ruff, types
#   make test     the test suite                              make format   let ruff rewrite the files
#   make bench    the benchmarks                              make clean    remove .venv and everything built
#
# PYTHON=python3.12       another interpreter for .venv (run `make clean` first if there is one)
# TORCH_INDEX=URL         where to look for torch besides pip's own configuration; on Linux PyPI has only the CUDA build, so
#                         a machine without a GPU saves gigabytes with https://download.pytorch.org/whl/cpu
# DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS    passed on: make test PYTEST_ARGS="-m 'not slow' -x"; make bench BENCH_ARGS=regions
#                         (or layer_to_layer, memory_against_depth, kills, gradinit, gradinit_effect, optim, sums; truegrad by default)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test
.PHONY: demo test bench lint format-check ruff types format clean

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?= truegrad

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

demo: $(VENV)/.demo
	$(BIN)/python examples/train_lm.py $(DEMO_ARGS)

# Two processes of one thread each: the suite compiles more than it computes.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.report --embed README.md

lint: format-check ruff types

format-check: $(VENV)/.lint
	$(BIN)/ruff format --check .

ruff: $(VENV)/.lint
	$(BIN)/ruff check .

# A type checker runs no import hooks, so it cannot follow passes/ to graphopt.passes; from the root it would skip the passes
# without a word. It gets a tree of links in the installed shape, and sed gives back the paths of the files that were checked.
types: $(VENV)/.lint
	rm -rf build/types
	mkdir -p build/types/graphopt
	ln -s "$(CURDIR)"/graphopt/* "$(CURDIR)"/passes build/types/graphopt/
	cd build/types && "$(CURDIR)"/$(BIN)/mypy -p graphopt --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		| sed 's#^graphopt/passes/#passes/#'

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The installs. Each stamp is older than pyproject.toml or constraints.txt only when they have changed since.

$(VENV)/.demo: extras := hf,cli,viz
$(VENV)/.test: extras := hf,cli,viz,wrappers,test
$(VENV)/.bench: extras := hf,cli,viz,wrappers,bench
$(VENV)/.lint: extras := hf,cli,viz,wrappers,dev

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --editable '.[$(extras)]'
	touch $@

# torch comes first and alone, at the one version that constraints.txt names: the range in pyproject.toml, resolved together
# with the rest, can pull a newer build and gigabytes of CUDA packages with it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	touch $@
