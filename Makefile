# Every target makes its own environment in .venv on first use; reruns are quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test check lint types contracts install clean

help:
	@echo "make demo       train, kill in the middle of a save, resume, compare bit for bit (about a minute)"
	@echo "make test       the whole test suite"
	@echo "make check      lint, types, import contracts and tests"
	@echo "make clean      remove .venv and all caches"

demo: $(STAMP)
	$(BIN)/asyncckpt demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: lint types contracts test

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

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
