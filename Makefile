# make demo: the embedded model adapted, compiled, measured.   make check: lint, types, layers, unit tests.   make test: all tests, too.
# Both build .venv from constraints.txt; a machine needs Python 3.11 or 3.12 and a C++ compiler, nothing else.

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
# a pyenv shim exists for versions that are not installed: only running one tells
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $(p) -c \
	'import sys; (3, 11) <= sys.version_info[:2] < (3, 13) and print("$(p)")' 2>/dev/null)))
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=

.PHONY: help demo check test lint format typecheck layers pytest unit docs serve-docs support-table clean
.DEFAULT_GOAL := help

help:
	@grep -E '^# make|^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -e 's/^# //' -e 's/:.*##/:/'

demo: $(VENV)/.demo ## adapt, compile, measure and let generate the embedded model
	$(BIN)/rana-fx demo

check: lint unit ## what takes under two minutes: lint, types, layers, unit tests

test: lint docs pytest ## everything that CI runs

# a file stays with one worker, which keeps what its tests share; the longest files start first (tests/conftest.py)
RUN_PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

pytest: $(VENV)/.test ## the tests alone; PYTEST_ARGS="tests/unit -x" narrows them
	$(RUN_PYTEST) $(PYTEST_ARGS)

unit: $(VENV)/.test ## the unit tests alone
	$(RUN_PYTEST) tests/unit $(PYTEST_ARGS)

lint: $(VENV)/.test ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck layers

# neither tool follows an editable install to passes/ and kernels/: .lint/rana_fx has links that put them where they install to
# (import-linter also wants an __init__.py in kernels/, which the real folder must not have)
.lint: FORCE
	@rm -rf .lint && mkdir -p .lint/rana_fx/kernels
	@ln -s $(addprefix $(CURDIR)/,$(wildcard rana_fx/*) passes) .lint/rana_fx/
	@ln -s $(addprefix $(CURDIR)/,$(wildcard kernels/*)) .lint/rana_fx/kernels/ && touch .lint/rana_fx/kernels/__init__.py

typecheck: $(VENV)/.test .lint ## mypy --strict
	cd .lint && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p rana_fx

layers: $(VENV)/.test .lint ## import-linter: who may import whom
	cd .lint && ../$(BIN)/lint-imports --config ../pyproject.toml --cache-dir ../.import_linter_cache

# --strict: a dead link, a missing anchor or a page that is not in the navigation fails the build
docs: $(VENV)/.test ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

serve-docs: $(VENV)/.test ## the site on http://127.0.0.1:8000, built again at every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

support-table: $(VENV)/.test ## docs/reference/support.md, from the results of the tests that it is about
	$(BIN)/python -m tests.support_table --run

format: $(VENV)/.test ## ruff format, and what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove all that make made
	rm -rf $(VENV) .lint build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: another package's bare "torch" would pull in a newer build with gigabytes of CUDA libraries;
# setuptools with it: the package itself is built with it, without fetching a second copy
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'installing from constraints.txt into $(VENV), a few minutes'
	$(PIP) setuptools wheel torch
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'installing from constraints.txt into $(VENV), a few minutes'
	$(PIP) setuptools wheel torch
	$(PIP) --no-build-isolation --editable '.[test,train,bench,eval,lint,docs]'
	@touch $@ $(VENV)/.demo

FORCE:
