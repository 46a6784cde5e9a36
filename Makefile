# Everything sets itself up: the first target that needs it makes .venv with the pinned dependencies.
# Recipes are plain POSIX sh.

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
STAMP = $(VENV)/.installed
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
NEWEST_PIP = $(NEWEST)/bin/python -m pip --disable-pip-version-check
# What test-newest takes in its newest version, and torch in the pinned one.
RENEWED = transformers tokenizers huggingface_hub safetensors datasets peft
TORCH = $(shell grep '^torch==' constraints.txt)

PYTEST_ARGS ?=

# The command refuses a directory that is not empty, so every run gets a new one.
DEMO_OUT := $(or $(DEMO_OUT),runs/demo-$(shell date +%Y%m%d-%H%M%S))
DEMO_ARGS ?= --preset fast --sparsity 0.2 --samples 24 --seq-len 512 --eval-tokens 10240

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-newest check lint types format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  PYTEST_ARGS='-m \"not slow\"'  DEMO_OUT=DIR  DEMO_ARGS='...'"

setup: $(STAMP)  ## make .venv with pinned dependencies (the other targets do it themselves)

demo: $(STAMP)  ## prune the embedded model and write a report (DEMO_OUT, DEMO_ARGS)
	$(VENV)/bin/llm-surgeon prune demo --out "$(DEMO_OUT)" $(DEMO_ARGS)

# Two processes with a thread each: the models of the tests are too small for more threads. Each process takes a half of
# the tests in their order, so that fixtures of a file are made once. PYTEST_ARGS='-n 0' runs all in one process.
test: $(STAMP)  ## run the tests (PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# Beyond the bounds of pyproject.toml too, which pip then names: what comes next is to be known before users have it.
# torch stays as it is pinned, for the reason below.
test-newest:  ## run the tests of loading, export and passes with the newest transformers (PYTEST_ARGS)
	test -x "$(NEWEST)/bin/python" || "$(PYTHON)" -m venv "$(NEWEST)"
	$(NEWEST_PIP) install --quiet $(TORCH) -e '.[lora]' pytest hypothesis
	$(NEWEST_PIP) install --quiet --no-deps -r requirements-oracle.txt
	$(NEWEST_PIP) install --quiet --upgrade $(TORCH) $(RENEWED)
	@$(NEWEST_PIP) freeze | grep -E "^($$(echo torch $(RENEWED) | tr ' ' '|'))=="
	$(NEWEST)/bin/python -m pytest $(PYTEST_ARGS) tests/models tests/export tests/passes tests/curvature \
	  tests/evaluation/test_perplexity.py

check: lint types  ## lint and types

lint: $(STAMP)  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)  ## mypy, strict, on the package
	$(VENV)/bin/mypy

format: $(STAMP)  ## let ruff fix and format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove .venv, .venv-newest, caches and builds (runs/ stays)
	rm -rf "$(VENV)" "$(NEWEST)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes exactly as constraints.txt pins it: an open range may take gigabytes of CUDA packages.
# The build backend is installed first and used without isolation, so that it is pinned as well; some packages of lm-eval
# are built here too, by setuptools.
# The oracle goes last, without its dependencies (requirements-oracle.txt says why).
$(STAMP): pyproject.toml constraints.txt requirements-oracle.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); llm-surgeon needs Python 3.11 or newer" >&2; \
	  echo "       name another one: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP) install --quiet -c constraints.txt hatchling editables setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install --quiet --no-deps -r requirements-oracle.txt
	@if $(PIP) --quiet show torchvision >/dev/null 2>&1; then \
	  echo "error: torchvision is in $(VENV) and breaks transformers there; run 'make clean' and try again" >&2; exit 1; fi
	@touch $@
