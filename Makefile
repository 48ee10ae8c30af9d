# `make help` lists what there is to do.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint types format docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/demo  ## install and federate a small CNN over 100 clients
	$(BIN)/shoal demo

test: $(VENV)/test lint types  ## install and run the whole check
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadgroup --ignore tests/keras_models
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile tests/keras_models # with TensorFlow, in processes that do not fork

quick: $(VENV)/test  ## the tests that take no more than a few seconds each
	$(BIN)/pytest -m "not slow" --ignore tests/keras_models

lint: $(VENV)/test  ## style and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/test  ## static types
	$(BIN)/mypy

format: $(VENV)/test  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs  ## build the pages into site/
	$(BIN)/mkdocs build

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "shoal needs Python 3.11 or newer; name one with: make PYTHON=python3.12 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# Torch comes first, by its pin: asked for without it, pip may take a build with gigabytes of CUDA packages.
$(VENV)/torch: $(VENV)/python constraints.txt
	$(PIP) install -q -c constraints.txt torch
	touch $@

$(VENV)/demo $(VENV)/test $(VENV)/docs: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e '.[$*]'
	touch $@
