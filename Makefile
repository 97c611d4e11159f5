# Every target sets up what it needs: a virtual environment made from $(PYTHON), with the versions
# in constraints.txt. `make test PYTHON=python3.12` keeps an environment of its own beside .venv.

PYTHON ?= python3
ARGS ?=
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS ?= $(CORES)

# One worker per core, so NumPy and scikit-learn get one thread each. XLA's pool needs no limit: two
# processes with a pool each were measured to share two cores fairly.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format docs bench notebooks clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY)  ## only make the virtual environment

# A pyenv shim is found on PATH but refuses to run a version that is not selected: ask pyenv then.
$(READY): pyproject.toml constraints.txt
	@set -e; python="$(PYTHON)"; \
	if ! "$$python" -c '' 2>/dev/null && command -v pyenv >/dev/null; then \
		python="$$(pyenv prefix "$(patsubst python%,%,$(PYTHON))")/bin/$(PYTHON)"; \
	fi; \
	if command -v uv >/dev/null; then \
		test -x $(BIN)/python || uv venv --python "$$python" $(VENV); \
		uv pip install --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
		"$$python" -m venv $(VENV); \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

demo: $(READY)  ## train on handwritten digits, sample, measure (options: ARGS="--help")
	$(BIN)/python -m experiments.digits $(ARGS)

test: $(READY)  ## every test (options: ARGS="-k ddim", WORKERS=8)
	$(PYTEST) $(ARGS)

test-fast: $(READY)  ## the tests that are not marked slow
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(READY)  ## ruff check, ruff format and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## let ruff fix and format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: $(READY)  ## write the generated pages of docs/
	$(BIN)/python -m tools.methods_table
	$(BIN)/python -m tools.api_tables
	$(BIN)/python -m tools.solvers_table

bench: $(READY)  ## run the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

notebooks: $(READY)  ## execute the notebooks' sources and write them as .ipynb
	$(BIN)/python -m tools.notebooks $(ARGS)

clean:  ## remove everything that was made, the environments too
	rm -rf .venv .venv-* .jax_cache .pytest_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
