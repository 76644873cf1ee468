# Every target sets up what it needs in .venv first; running a target twice does no work twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
CONSTRAINTS := constraints-ci.txt
STAMP := $(VENV)/.installed
RECIPE ?= tiny_cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test test-fast test-kernels test-slow test-gpu test-distributed test-all lint types docs \
        bench verify formal mutation ci clean

help:
	@echo 'make train             install and train the tiny recipe on real text'
	@echo 'make test              install and pass the tests (default suite, docs and lint included)'
	@echo 'make test-kernels      Triton kernels: interpreter, then ahead-of-time compilation (no GPU needed)'
	@echo 'make test-slow | test-gpu | test-distributed | test-all'
	@echo 'make verify            print the table of claims (python -m proofs)'
	@echo 'make formal            install Coq (Debian) and check the machine-checked theorems'
	@echo 'make docs | bench | lint | types | mutation | clean'

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c $(CONSTRAINTS) -e '.[dev,bench]'
	@touch $@

setup: $(STAMP)

train: $(STAMP)
	$(PY) -m mhc_layers train --recipe $(RECIPE)

test: lint types test-fast docs

# One BLAS/OpenMP thread a worker: two workers on two cores, not four threads on two cores.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

test-kernels: $(STAMP)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -q -n 2 -m interpret
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m aot

test-slow: $(STAMP)
	$(PY) -m pytest -q -m slow

test-gpu: $(STAMP)
	$(PY) -m pytest -q -m gpu

test-distributed: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m distributed

test-all: test test-kernels test-slow test-distributed

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(PY) docs/fetch_mathjax.py
	$(PY) -m sphinx -q -W -n --keep-going -b html docs docs/_build/html
	$(PY) -m sphinx -q -W -b doctest docs docs/_build/doctest

bench: $(STAMP)
	$(PY) -m benchmarks projection

verify: $(STAMP)
	$(PY) -m proofs --profile ci

formal:
	$(MAKE) -C proofs/formal

# Hours of processor time; verdicts are kept in mutation*.jsonl as they are found, and a second run goes on from there.
mutation: $(STAMP)
	$(PY) -m tests.mutation
	$(PY) -m tests.mutation.kernels

ci: test test-kernels

clean:
	rm -rf $(VENV) docs/_build build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
