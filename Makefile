# Two commands: `make train` trains the default recipe on real data, `make test` runs the checks and the fast tests.
# `make test-colab` runs the fast tests against the versions of Colab's TPU image, in an environment of its own.
PYTHON ?= python3
VENV ?= .venv
COLAB_VENV ?= .venv-colab
CONSTRAINTS = constraints/main.txt
COLAB_CONSTRAINTS = constraints/colab.txt
BIN = $(VENV)/bin
SOURCES = spec jax_impl torch_ref spec_tests notebooks docs
WORKERS ?= auto
# As many workers as cores: threads of torch's own in each would only wait for one another.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: train test test-all test-colab test-notebooks docs data lint format wheel clean

train: $(VENV)/.train
	$(BIN)/python -m jax_impl.train

test: lint data
	$(PYTEST) -m "not slow"

test-all: lint data
	$(PYTEST)

test-colab: $(COLAB_VENV)/.test
	OMP_NUM_THREADS=1 $(COLAB_VENV)/bin/python -m pytest -n $(WORKERS) -m "not slow"

# Every notebook, whole, in quick mode, on 1 and on 4 devices, in both worlds; `make test-all` has them in full mode too.
test-notebooks: data $(COLAB_VENV)/.test
	$(PYTEST) spec_tests/test_notebooks.py -k "not full_mode"
	OMP_NUM_THREADS=1 $(COLAB_VENV)/bin/python -m pytest -n $(WORKERS) spec_tests/test_notebooks.py -k "not full_mode"

# Without any source for it, the tests on real data say that they skip.
data: $(VENV)/.test
	-$(BIN)/python -m spec.datasets fetch fashion_mnist

# The site of README, SPEC.md, pages and notebooks, in build/site; the notebooks are run, in quick mode unless told.
LOCKSTEP_QUICK ?= 1
docs: data
	rm -rf notebooks/runs
	LOCKSTEP_QUICK=$(LOCKSTEP_QUICK) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

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
	rm -rf $(VENV) $(COLAB_VENV) build dist

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

$(COLAB_VENV)/.test: pyproject.toml $(COLAB_CONSTRAINTS)
	$(PYTHON) -m venv $(COLAB_VENV)
	$(COLAB_VENV)/bin/python -m pip install --quiet --constraint $(COLAB_CONSTRAINTS) --editable '.[test]'
	@touch $@
