# `make demo` and `make test` work on a fresh clone with python3, make and a shell: each creates .venv on first use.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# make test ARGS="tests/tasks -x"
ARGS ?=

# The stamp is written last: a creation that fails is taken up again by the next make. An environment made from
# older requirements is brought to the new ones.
$(STAMP): pyproject.toml locks/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	    echo "$$($(PYTHON) --version) found, 3.11 to 3.13 needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@rm -f $@
	@echo "Installing into .venv (several GB, most of it PyTorch; minutes on first use)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    --constraint locks/dev.txt --editable '.[demo,dev,export,s3]' 2>&1 | tee .venv/install.log | awk ' \
	    /^ *(Collecting|Processing) / && ++n % 50 == 0 { print "  " n " packages found"; fflush() } \
	    /^Installing collected/ { print "  unpacking " n " packages"; fflush() }' || { \
	    tail -n 30 .venv/install.log; echo "The installation failed; .venv/install.log has all of it."; exit 1; }
	@touch $@

.PHONY: help
help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(STAMP)  ## embed photographs with trained weights on this machine, no GPU or network needed
	@$(BIN)/python -m flows.demo $(ARGS)

.PHONY: up
up: $(STAMP)  ## start a Prefect server, a worker and the deployments here; ARGS="--port 4300 --notify URL"
	@$(BIN)/python -m deployments.local up $(ARGS)

.PHONY: down
down: $(STAMP)  ## end them
	@$(BIN)/python -m deployments.local down

.PHONY: test
test: $(STAMP)  ## run the tests; ARGS="tests/tasks -x" picks some
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: chaos
chaos: $(STAMP)  ## run the tests that kill workers and servers in the middle of a run
	@$(BIN)/python -m pytest -m chaos -o faulthandler_timeout=900 $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP)  ## fuzz the reading of tars for four minutes; ARGS=-max_total_time=60 changes that
	@$(BIN)/python -m tests.fuzz_tar -max_total_time=240 -print_final_stats=1 $(ARGS)

.PHONY: deployed
deployed: $(STAMP)  ## run the tests of the deployments on a server of their own, with SQLite and PostgreSQL
	@$(BIN)/python -m pytest -m deployed $(ARGS)

# Debian's packages; the test starts and ends the daemons itself.
.PHONY: slurm
slurm: $(STAMP)  ## run the Slurm recipe on a real Slurm on loopback; needs root, installs slurm-wlm and munge if missing
	@PATH="$$PATH:/usr/sbin"; command -v munged slurmctld slurmd >/dev/null || { \
	    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm munge; }
	@$(BIN)/python -m pytest -m slurm $(ARGS)

.PHONY: docs
docs: $(STAMP)  ## run every code block of the README and docs/
	@$(BIN)/python -m pytest -m slow tests/test_docs.py $(ARGS)

.PHONY: browser
browser: $(STAMP)  ## open the report and the Prefect UI in Chromium, which must be installed
	@$(BIN)/python -m pytest -m browser $(ARGS)

.PHONY: lint
lint: $(STAMP)  ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: format
format: $(STAMP)  ## mend what style and formatting can be mended by a program
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: types
types: $(STAMP)  ## check the types
	@$(BIN)/mypy

.PHONY: check-locks
check-locks: $(STAMP)  ## prove that every dependency set still resolves to its lock
	@$(BIN)/python locks/lock.py --check

.PHONY: lock
lock: $(STAMP)  ## resolve the locks anew; ARGS=--upgrade takes the newest versions
	@$(BIN)/python locks/lock.py $(ARGS)

.PHONY: bench
bench: $(STAMP)  ## measure the ceilings and the peers, side by side
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: clean
clean:  ## remove what commands left here, but not .venv
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-data demo-out
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

.PHONY: distclean
distclean: clean  ## remove .venv too
	@rm -rf .venv
