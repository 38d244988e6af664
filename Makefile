# The two commands of the README, and what they stand on. Both make .venv when it is absent.
PYTHON ?= python3
BIN := .venv/bin
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Threads that wait for each other sleep: on shared cores, spinning ones are ten times slower.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help simulate test test-fast torture lint proto wheel clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "homefire needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps pfl # see pyproject.toml
	touch $@

simulate: .venv/.installed  ## The main job: users, a shared adapter, private adapters, a report
	$(BIN)/homefire models get smollm2-135m
	$(BIN)/homefire simulate

test: lint wheel  ## Everything CI checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-fast: .venv/.installed  ## The tests that need no more than a few seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

torture: .venv/.installed  ## Kill servers and devices at 700 random moments and more; check what must hold
	$(BIN)/python tests/torture.py --kills 200
	$(BIN)/python tests/vault_torture.py --kills 200
	OMP_NUM_THREADS=1 $(BIN)/python tests/device_torture.py --kills 200
	OMP_NUM_THREADS=1 $(BIN)/python tests/join_torture.py --kills 24
	OMP_NUM_THREADS=1 $(BIN)/python tests/server_torture.py --kills 70
	OMP_NUM_THREADS=1 $(BIN)/python tests/server_torture.py --kills 35 --mechanism gaussian

lint: .venv/.installed  ## Format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

proto: .venv/.installed  ## Make common/registry_pb2.py from common/registry.proto
	$(BIN)/python tests/generate_registry.py

wheel: .venv/.installed  ## Build the wheel and import it away from the checkout
	$(BIN)/python tests/check_wheel.py

clean:  ## Remove what the targets made (never runs/)
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
