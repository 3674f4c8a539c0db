# Everything runs from a clean checkout: each target sets up what it needs in .venv first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEVICE ?= cpu

TEST_WORKERS ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.for-test ## One KV-cache handle through torch, JAX and NumPy on a small model
	$(BIN)/python examples/kv_handoff.py --device $(DEVICE) $(DEMO_ARGS)

# Each worker has thread pools of its own for NumPy, torch and JAX: one thread each for the first
# two keeps workers x threads near the number of cores. On a GPU machine the workers share the
# card, so JAX may not take three quarters of it at its start.
test: export OMP_NUM_THREADS ?= 1
test: export OPENBLAS_NUM_THREADS ?= 1
test: export MKL_NUM_THREADS ?= 1
test: export XLA_PYTHON_CLIENT_PREALLOCATE ?= false
test: $(VENV)/.for-test ## Run the tests (TEST_WORKERS=auto, PYTEST_ARGS=...)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --maxprocesses=8 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.for-lint ## ruff check, ruff format --check, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.for-bench ## Measure; results land in benchmarks/results
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

docs: $(VENV)/.for-docs ## Build the documentation into build/site
	$(BIN)/python -m mkdocs build --strict --quiet

clean: ## Remove the environment, caches and build products
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# An environment is stamped for each set of extras; a change of the two files renews it.
$(VENV)/.for-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
