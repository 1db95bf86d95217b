# Every target makes its own environment in .venv on first use; reruns are quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The benchmarks need their peers, which the package does not: an environment of their own.
BENCH := .bench
BENCH_STAMP := $(BENCH)/.installed
BENCH_ARGS ?=

.PHONY: help demo test check bench lint types contracts install clean

help:
	@echo "make demo       train, kill in the middle of a save, resume, compare bit for bit (about a minute)"
	@echo "make test       the whole test suite"
	@echo "make check      lint, types, import contracts and tests"
	@echo "make bench      every benchmark of benchmarks/suite.py: tables, JSON, pictures (sixteen minutes)"
	@echo "make clean      remove .venv, .bench and all caches"

demo: $(STAMP)
	$(BIN)/asyncckpt demo

# Unit tests have a process of their own: many are about its signal handlers, threads and memory, and start from a clean one.
test: $(STAMP)
	$(BIN)/python -m pytest tests/unit
	$(BIN)/python -m pytest --ignore=tests/unit

check: lint types contracts test

bench: $(BENCH_STAMP)
	$(BENCH)/bin/python benchmarks/suite.py $(BENCH_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "asyncckpt needs Python 3.11 or newer; say which: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Not --clear: trained states are kept there, too.
$(BENCH_STAMP): benchmarks/requirements.txt constraints.txt
	$(PYTHON) -m venv $(BENCH)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e . -r benchmarks/requirements.txt
	@touch $(BENCH_STAMP)

clean:
	rm -rf $(VENV) $(BENCH) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
