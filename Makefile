# make demo   set-up, then a demonstration on this machine
# make test   set-up, the packages of the test lab, then every check
# make lowest the tests that need no lab, with the oldest packages that pyproject.toml allows
# make bench  what rendering and reloading cost on this machine
# make venv   set-up alone: .venv with pman, the demo's and the developers' packages
# make clean  removes .venv and the tools' caches
#
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --no-input
INSTALLED := $(VENV)/.installed
CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help demo test lowest bench venv lab clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(INSTALLED)
	$(BIN)/pman demo

test: $(INSTALLED) lab
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy pman tests docs
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 4 --dist worksteal  # most of the time they wait for Slurm

lowest: $(INSTALLED)
	@echo "lowest: installing the oldest packages allowed into $(OLDEST)"
	@$(PIP) install uv
	@$(BIN)/uv --quiet venv --clear $(OLDEST) --python $(BIN)/python
	@$(BIN)/uv --quiet pip install --python $(OLDEST)/bin/python --resolution lowest-direct \
	    --editable '.[cromwell,demo]' --group dev
	$(OLDEST)/bin/python -m pytest -n 4 -p no:cacheprovider -m 'not lab' \
	    --ignore tests/lab --ignore tests/test_wheel.py

bench: $(INSTALLED)
	$(BIN)/python -m tests.bench

venv: $(INSTALLED)

# Exit 3: this machine can't have the lab. `problem` also knows what packages alone don't mend.
lab: $(INSTALLED)
	@echo "lab: installing the Debian packages that are missing, if any"
	@$(BIN)/python -m tests.lab install || [ $$? -eq 3 ]
	@$(BIN)/python -c 'import sys; from tests.lab import problem; sys.exit(problem())' || { \
	    [ -z "$${CI:-}" ] || { echo "lab: CI is set: nothing may be skipped" >&2; exit 1; }; \
	    echo "lab: so the tests that need a real Slurm, sshd or Apptainer are skipped" >&2; \
	}

# --group needs pip 25.1.
$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "venv: installing pman and its packages into $(VENV) (a minute or two the first time)"
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(PIP) install --editable '.[cromwell,demo]' --group dev
	@touch $@

# Debian packs ensurepip, without which a venv has no pip, apart from Python.
$(BIN)/python:
	@python=; \
	for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c '$(NEW_ENOUGH)' 2> /dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "venv: pman needs Python 3.11 or newer, and none was found among:" \
	        "$(CANDIDATES)." \
	        "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	    exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2> /dev/null; then \
	    package=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	    if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then \
	        echo "venv: $$python has no ensurepip: install it" \
	            "(Debian, Ubuntu: apt-get install $$package)" >&2; \
	        exit 1; \
	    fi; \
	    echo "venv: apt-get install $$package"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -qq install -y --no-install-recommends "$$package" > /dev/null 2>&1 || { \
	        apt-get -qq update; \
	        apt-get -qq install -y --no-install-recommends "$$package" > /dev/null; \
	    }; \
	fi; \
	echo "venv: $$("$$python" --version) in $(VENV)"; \
	"$$python" -m venv --clear $(VENV)

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
