# What can be done here; bare `make` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup zookeeper testtools lint format test unit demo chaos bench clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ROUNDS ?= 8
KILL ?= 1
COORDINATOR ?= auto
SECONDS_ := $(if $(filter command line environment,$(origin SECONDS)),$(SECONDS),600)
SEED ?= 7
# Without a GPU the CPU build of torch will do; the plain one brings gigabytes of CUDA.
CONSTRAINTS := $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) zookeeper testtools ## Make .venv with all dependencies, and install ZooKeeper, Chromium and HAProxy where that is possible

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (PYTHON=… chooses another)")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[torch,metrics,s3,sasl,simulation,dev]'
	$(BIN)/python -m pip check
	touch $@

zookeeper:
	@zookeeper/install.sh

testtools: $(STAMP)
	@tests/install.sh

lint: $(STAMP) ## Check format, style, types and the layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup ## Run the whole suite, real ZooKeeper and real SuperNodes included
	$(BIN)/python -m pytest -n 2 --dist loadfile

unit: $(STAMP) ## Run the tests that need no process
	$(BIN)/python -m pytest tests/unit

demo: $(STAMP) zookeeper ## Train the MNIST CNN while the leader is killed (ROUNDS=8 KILL=1 COORDINATOR=zookeeper|embedded)
	$(BIN)/python -m flwr_ha demo --rounds $(ROUNDS) --kill $(KILL) --coordinator $(COORDINATOR)

chaos: $(STAMP) zookeeper ## Inject random faults for SECONDS=600 from SEED=7 and check the invariants; kill 100 leaders as they acknowledge
	$(BIN)/python -m pytest -m long
	$(BIN)/python -m tests.chaos --seconds $(SECONDS_) --seed $(SEED)
	$(BIN)/python -m tests.chaos.network --seconds 300 --seed $(SEED)
	$(BIN)/python -m tests.acknowledged --times 50 --what runs
	$(BIN)/python -m tests.acknowledged --times 50 --what supernodes

bench: $(STAMP) zookeeper ## Measure side by side; writes bench/results.json
	$(BIN)/python -m bench

clean: ## Remove what setup, tests and the demo made
	rm -rf .venv .flwr-ha .flwr-releases .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist *.fab bench/results.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
