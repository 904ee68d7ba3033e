# Two commands: `make train` trains the default recipe on real data, `make test` runs the checks and the fast tests.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS = constraints/main.txt
BIN = $(VENV)/bin
SOURCES = spec jax_impl torch_ref spec_tests
WORKERS ?= auto

.PHONY: train test test-all data lint format wheel clean

train: $(VENV)/.train
	$(BIN)/python -m jax_impl.train

test: lint data
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: lint data
	$(BIN)/python -m pytest -n $(WORKERS)

# Without any source for it, the tests on real data say that they skip.
data: $(VENV)/.test
	-$(BIN)/python -m spec.datasets fetch fashion_mnist

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

wheel: $(VENV)/.test
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; give a newer one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	@touch $@ $(VENV)/.train
