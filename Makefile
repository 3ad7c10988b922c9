# What this repository can do. `make` alone lists it. Nothing is needed beyond git, GNU make and Python >= 3.11.

PYTHON ?= python3
PORT = 8080
PYTEST_ARGS ?= -n 3 -rs
BENCH_ARGS ?=
LOCK_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test check bench faults lock clean FORCE

# An inherited interpreter path would let packages in that the lock does not name. And without bytecode on the disk each
# of the hundreds of processes that the tests start would compile the program for itself.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

BIN := .venv/bin

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/.run-stamp ## Start the demo on 127.0.0.1:8080 (another port: make run PORT=9000)
	@exec $(BIN)/breakwater demo --port $(PORT)

test: .venv/.dev-stamp ## Run every test (some of them: make test PYTEST_ARGS="-k sse")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/.dev-stamp ## Check format, lint, types, locks and architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.locks check
	$(BIN)/python -m pytest tests/test_architecture.py

bench: .venv/.dev-stamp ## Measure processor time, latency and memory (as JSON: make bench BENCH_ARGS=--json)
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

faults: .venv/.dev-stamp ## Run the fault tests in their long form (minutes)
	BREAKWATER_FAULTS=1 $(BIN)/python -m pytest -rs -m faults

lock: .venv/.dev-stamp ## Resolve pyproject.toml into both lock files (newer versions: make lock LOCK_ARGS=--upgrade)
	$(BIN)/python -m tests.locks write $(LOCK_ARGS)

clean: ## Remove the environment and every cache
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Always asked, since the script knows by digests whether there is something to do, and answers in a blink if not.
.venv/.run-stamp .venv/.dev-stamp: .venv/.%-stamp: FORCE
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or later is needed and '$(PYTHON)' is not there: install it, or say make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed, and '$(PYTHON)' is older: say make PYTHON=/path/to/python3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' comes without venv: install it (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@$(PYTHON) tests/install.py $*
FORCE:
