# What a user may rely on is what `make help` prints.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -qq
# tests/vm is run by hand until its node in the guest follows the stand-in kubelet: python -m pytest tests/vm
TESTS := $(wildcard tests/unit tests/daemon tests/host)
export PYTHON

.PHONY: help run test check bench fuzz soak proto schema lock clean

help:  ## this list
	@echo "nodeagent: make <target>"
	@sed -nE 's/^([a-z]+):.*  ## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

run: $(VENV)/.run  ## as root: the daemon on this node with two gVisor desktops, until Ctrl-C (ONCE=1: one round, JSON last)
	@.ci/packages run
	@exec $(PY) -m nodeagent demo $(if $(ONCE),--once)

test: $(VENV)/.test  ## everything this machine can test: unit, daemon, host (root); what is skipped says why
	@.ci/packages test
	@exec $(PY) -m pytest $(TESTS)

check: $(VENV)/.test  ## formatting, lint, types, house rules and unit tests: no root, no network, under a minute
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy
	@$(PY) -m pytest $(call half,1) & first=$$!; second=0; \
		$(PY) -m pytest $(call half,0) || second=$$?; wait $$first && exit $$second

# Two halves of about one size, side by side: one core alone needs more than the minute. test_lint repeats what stands above.
UNIT := $(filter-out tests/unit/test_lint.py,$(shell ls -S tests/unit/test_*.py 2>/dev/null))
half = $(shell printf '%s\n' $(UNIT) | awk 'NR % 2 == $(1)')

bench: $(VENV)/.test  ## side-by-side measurements: a table, and bench/results.json
	@.ci/packages test
	@exec $(PY) -m bench

fuzz: $(VENV)/.test  ## mutated input for every decoder (MINUTES=1); totals add up in bench/long.json
	@exec $(PY) -m tests.fuzz --minutes $(or $(MINUTES),1)

soak: $(VENV)/.test  ## as root: the main job again and again (MINUTES=60); totals add up in bench/long.json
	@.ci/packages test
	@exec $(PY) -m tests.soak --minutes $(or $(MINUTES),60)

proto: $(VENV)/.test  ## nodeagent/wire/pb anew from proto/
	@$(PY) proto/generate.py

schema: $(VENV)/.test  ## charts/nodeagent/values.schema.json anew from nodeagent/config.py
	@$(PY) -m charts.schema

# Only names, versions and hashes go into the lock files: an index belongs to the machine that installs.
LOCK := $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links --upgrade pyproject.toml --extra build
lock: $(VENV)/.test  ## requirements.lock (runtime) and requirements-dev.lock (with tools) anew from pyproject.toml
	@test -x $(VENV)/bin/uv || $(PIP) install uv
	@$(LOCK) --output-file requirements.lock
	@$(LOCK) --extra dev --output-file requirements-dev.lock

clean:  ## removes what the other targets made here: environment, caches, builds
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +

# ---- the virtual environment, from the lock, with hashes; a stamp per kind makes the second time instant

$(VENV)/.run: requirements.lock pyproject.toml
	$(call environment,requirements.lock)
	@touch $@

$(VENV)/.test: requirements-dev.lock pyproject.toml
	$(call environment,requirements-dev.lock)
	@touch $@ $(VENV)/.run

# $(call environment,LOCK): setuptools comes from the lock too, hence no build isolation for nodeagent itself.
define environment
	@.ci/packages run
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(PY) || { echo "make: creating $(VENV)" >&2; $(PYTHON) -m venv $(VENV); }
	@echo "make: installing $(1) into $(VENV)" >&2
	@$(PIP) install --require-hashes -r $(1) >&2
	@$(PIP) install --no-deps --no-build-isolation -e . >&2
endef
