# One command each. A machine with Python >= 3.10 and make is enough: the first target makes .venv.
#
#   make bench      the main job: 8 rank processes move a real routing, every byte checked, with comparisons
#   make sweep      the ways that rows can go, by size: a table and a picture
#   make bench-gpu  CUDA tensors between virtual ranks of this machine's GPU, right first, then timed; installs nothing
#   make test       quick tests          make test-all   all tests
#   make check      format, lint, strict types, layers, inert import
#   make install    no more than .venv, from which .venv/bin/python and .venv/bin/anyep run
#   make clean      forget everything that these targets made
#
#   make PYTHON=python3.12 ...     another interpreter
#   make BENCH="--ranks 4" bench   more options for the benchmark

PYTHON ?= python3
BENCH ?=
# Tests start rank processes of their own, and wait for many of them: two files at a time keep two cores busy.
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RESULTS := benchmarks/results
SOURCES := src tests benchmarks examples

.PHONY: bench bench-gpu sweep test test-all check install clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# torch comes first and by exact version: left to a resolver, it brings gigabytes of GPU packages along.
# Triton is the one that torch has brought, or else that of triton.txt.
$(STAMP): pyproject.toml constraints.txt triton.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is None)" || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement triton.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[bench,dev,pictures]"
	touch $(STAMP)

bench: $(STAMP)
	mkdir -p $(RESULTS)
	$(BIN)/anyep bench --compare gloo,mpich --tokens 4096 --tokens 128 --latency 2x1,2x0,8x0 \
		--json $(RESULTS)/bench.json $(BENCH)
	$(BIN)/python benchmarks/import_time.py --json $(RESULTS)/import.json

bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu --json $(RESULTS)/gpu.json $(BENCH)

sweep: $(STAMP)
	mkdir -p $(RESULTS)
	$(BIN)/anyep bench --sweep tokens=1,8,32,128,512,2048 \
		--json $(RESULTS)/sweep.json --picture $(RESULTS)/sweep.png $(BENCH)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 3600

check: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/project

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
