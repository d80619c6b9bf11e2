"""JAX's own switches: whatever a user's process has set, the same numbers come out.

A function that is traced to the same program computes the same numbers, and takes no time to compile. The slow tests
run what users call, and compare.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bert_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bert
import small_llama
from flax import nnx

import aq_jax as aq
from aq_jax import QuantizationConfig, QuantSpec
from aq_jax.core.dispatch import ACTIVATIONS, Activations
from aq_jax.nn import quantize_module
from aq_jax.nn.decoding import Texts, begin, decode_tokens, read_chunk
from aq_jax.nn.models import FAMILIES
from aq_jax.nn.models.bert import Bert, BertConfig
from aq_jax.nn.sampling import Sampling
from aq_jax.nn.scoring import log_likelihoods
from aq_jax.quantizers.gptq import gptq
from aq_jax.quantizers.hessian import prepare_hessian

X64, RANKS, DTYPES, JIT, NANS = "x64", "rank promotion", "dtype promotion", "disable_jit", "debug_nans"
SWITCHES: Mapping[str, Callable[[], Any]] = {
    X64: lambda: jax.enable_x64(True),
    RANKS: lambda: jax.numpy_rank_promotion("raise"),
    DTYPES: lambda: jax.numpy_dtype_promotion("strict"),
    JIT: jax.disable_jit,
    NANS: lambda: jax.debug_nans(True),
}
KINDS = {
    "channels": QuantizationConfig("int8"),
    "one grid": QuantizationConfig("int8", per_channel=False),
    "2 bits": QuantizationConfig("int2", group_size=16),
    "3 bits": QuantizationConfig("int3", group_size=16, symmetric=False, solver="minmax"),
    "4 bits, rotated": QuantizationConfig("int4", group_size=32, symmetric=False, rotate=True),
    "short last group": QuantizationConfig("int4", group_size=24, symmetric=False),
}
# NumPy arrays, which are the same under every switch; float64 ones are computed in float32.
W, X, MOMENT = (np.random.default_rng(n).normal(size=(rows, 64)) for n, rows in enumerate((6, 3, 64)))
MOMENT = (MOMENT.T @ MOMENT).astype(np.float32)
X, IDS = X.astype(np.float32), np.array([[0, 5, -1]], np.int32)
BERT = BertConfig.from_json({**bert_oracle.CONFIG, "num_hidden_layers": 1, "vocab_size": 16}, "test")
LLAMA = FAMILIES["llama"]
SIZES = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
SPECS = {"groups": QuantSpec(2, group_size=16), "rotated": QuantSpec(3, group_size=32, rotation=64)}


def with_a_weight(kind: str) -> Any:
    """Everything that is done to one weight, and with it."""
    q = aq.quantize(W, KINDS[kind])
    assert isinstance(q, aq.QTensor)
    how = [each for each in ACTIVATIONS if each != "int8" or kind != "short last group"]
    return {
        "quantize": q,
        "dequantize": aq.dequantize(q),
        "qembed": aq.qembed(q, jnp.asarray(IDS)),
        "qdot": [aq.qdot(jnp.asarray(X), q, each) for each in how],
        "qdot, grad": [jax.grad(lambda x, each=each: aq.qdot(x, q, each).sum())(jnp.asarray(X)) for each in how],
        "fake_quant": jax.grad(lambda w: (aq.fake_quant(w, KINDS[kind]) ** 2).sum())(jnp.asarray(W, jnp.float32)),
    }


def with_a_trellis() -> Any:
    """Quantize as a program does; an array that is there is quantized on the host."""
    quantized = jax.jit(lambda w: aq.quantize(w, QuantizationConfig("tcq3", solver="viterbi")))
    return quantized(W[:2, :8].astype(np.float32))


def with_channels() -> Any:
    """The least of all that."""
    q = aq.quantize(W, "int8")
    assert isinstance(q, aq.QTensor)
    return q, aq.dequantize(q), aq.qdot(jnp.asarray(X), q, "int8")


def with_gptq(name: str) -> Any:
    spec = SPECS[name]
    return gptq(W.astype(np.float32), prepare_hessian(MOMENT, 0.01, spec.rotation), spec, symmetric=name == "groups")


def with_a_model(kind: str, activations: Activations) -> Any:
    """Models of initial weights, quantized, and run on two texts, one of them empty, as those that fill up a batch."""
    ids = np.zeros((2, 8), np.int32)
    if kind == "bert":
        model = quantize_module(Bert(BERT, activations=activations, rngs=nnx.Rngs(0)), "int8", activations=activations)
        return model(jnp.asarray(ids), jnp.asarray([[True] * 5 + [False] * 3, [False] * 8]))
    model = LLAMA.module(LLAMA.read(SIZES, "sizes"), activations=activations, rngs=nnx.Rngs(0))
    model = quantize_module(model, "int8", activations=activations)
    ids, first, most = jnp.asarray(ids), jnp.array([0, 3], jnp.int32), jnp.array([5, 4], jnp.int32)
    texts = Texts(first, most, jnp.asarray(Sampling(0.5, 3, 0.9, 0.1, 1.2).numbers()), np.uint32(0))
    cache, hidden = read_chunk(model, model.empty_cache(2, 16, "int8"), ids, jnp.int32(0), first)
    state = cache, *begin(model, hidden, jnp.zeros((2, 16), bool), texts, eos_ids=(2,))
    numbers = jnp.int32(8), jnp.int32(1), jnp.int32(3)
    return decode_tokens(model, state, texts, *numbers, eos_ids=(2,)), log_likelihoods(model, ids[:1])


CASES: Mapping[str, Callable[[], Any]] = {
    "least": with_channels,
    **{kind: functools.partial(with_a_weight, kind) for kind in KINDS},
    "trellis": with_a_trellis,
    **{f"gptq, {name}": functools.partial(with_gptq, name) for name in SPECS},
    **{f"bert, {how}": functools.partial(with_a_model, "bert", how) for how in ACTIVATIONS},
    **{f"llama, {how}": functools.partial(with_a_model, "llama", how) for how in ACTIVATIONS},
}


@functools.cache
def usual(case: str) -> str:
    return program(case)


def program(case: str) -> str:
    return str(jax.make_jaxpr(CASES[case])())


# Models differ by what they round to in nothing that is not in the cases of one weight.
SLOW = {f"{model}, {how}" for model in ("bert", "llama") for how in ACTIVATIONS if how != "int8"}
TRACED = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES if case != "least"]


@pytest.mark.parametrize("case", TRACED)
def test_programs_are_the_same(case: str) -> None:
    """Under both of the switches that forbid something; a slow test asks for each alone."""
    with SWITCHES[RANKS](), SWITCHES[DTYPES]():
        found = program(case)
    assert found == usual(case)


@pytest.mark.parametrize("case", TRACED)
def test_no_array_is_of_64_bits(case: str) -> None:
    with SWITCHES[X64]():
        found = program(case)
    # Constants, such as 0.0, are scalars, and become float32 where they are used; W itself is float64.
    assert set(re.findall(r"f64\[\d[\d,]*\]", found)) <= {"f64[6,64]"}


@functools.cache
def value(case: str) -> Any:
    return run(case)


def run(case: str) -> Any:
    return jax.tree.map(np.asarray, CASES[case]())


@pytest.mark.parametrize(
    ("case", "switch"),
    [
        pytest.param(case, switch, marks=() if case == "least" else pytest.mark.slow)
        for switch in SWITCHES
        for case in CASES
        if switch != JIT or not case.startswith("gptq")  # a loop over columns
    ],
)
def test_values_are_the_same(case: str, switch: str) -> None:
    with SWITCHES[switch]():
        found = run(case)
    assert jax.tree.structure(found) == jax.tree.structure(value(case))
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(value(case)), strict=True):
        assert got.dtype == wanted.dtype
        # Compiled, a product of bfloat16 is not rounded before it is added. Nothing may differ in codes of weights;
        # those of inputs and of a cache, whose numbers are rounded otherwise, may be the next ones.
        rounded = case == "llama, int8" and switch == JIT
        atol = (1 if got.dtype == np.int8 else 2e-2) if rounded else 1e-5
        np.testing.assert_allclose(got, wanted, rtol=2e-2 if "bfloat16" in case else 1e-5, atol=atol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of a BERT and of a Llama, as they are and quantized."""
    out = tmp_path_factory.mktemp("models")
    for path in (small_bert.make(out, name="bert.parquet"), small_llama.make(out / "llama")):
        aq.quantize_file(path, path.with_name(f"int4_{path.name}"), KINDS["4 bits, rotated"])
        aq.quantize_file(path, path.with_name(f"int8_{path.name}"), KINDS["channels"])
    return out


def ran(path: Path, activations: Activations) -> list[np.ndarray]:
    """What a loaded model says."""
    model = aq.load_model(path, activations=activations)
    if "bert" in path.name:
        return [np.asarray(model.encode(["the cat sat", "a dog", "red " * 30]))]
    drawn = [model.generate_ids([1, 5, 7], 8, temperature=heat, top_p=0.9, seed=3) for heat in (0.0, 0.8)]
    return [*map(np.asarray, drawn), np.asarray(model.score("the hen an ab"))]


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", ["bert.parquet", f"llama/{small_llama.TABLE}"])
def test_models_say_the_same(folder: Path, name: str, switch: str) -> None:
    plain = folder / name
    kinds: list[tuple[str, Activations]] = [("", "float32"), ("int8_", "int8"), ("int4_", "float32")]
    for before, how in kinds:
        path = plain.with_name(before + plain.name)
        wanted = ran(path, how)
        with SWITCHES[switch]():
            found = ran(path, how)
        for got, value in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("switch", [X64, RANKS, DTYPES])
def test_files_are_the_same(folder: Path, switch: str) -> None:
    source, config = folder / "bert.parquet", QuantizationConfig("int2", group_size=16, symmetric=False, solver="gptq")
    text = folder / "text.txt"
    text.write_text("the cat sat\na dog runs\nthe sun\n" * 10)
    for solver in ("mse", "gptq"):
        files = [folder / f"{solver}_{n}.parquet" for n in range(2)]
        calibration = aq.CalibrationConfig(str(text)) if solver == "gptq" else None
        asked = dataclasses.replace(config, solver=solver)
        aq.quantize_file(source, files[0], asked, calibration=calibration)
        with SWITCHES[switch]():
            aq.quantize_file(source, files[1], asked, calibration=calibration)
        before, after = (aq.load(path, packed=True) for path in files)
        for name, wanted in before.items():
            for a, b in zip(jax.tree.leaves(after[name]), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{solver}: {name}")


def test_weights_of_64_bits_are_computed_in_32() -> None:
    with SWITCHES[X64]():
        w = jnp.asarray(W.copy())  # JAX remembers as what it has taken an array before
        assert w.dtype == np.float64
        for config in (KINDS["channels"], KINDS["3 bits"]):
            found, wanted = aq.quantize(w, config), aq.quantize(W.astype(np.float32), config)
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
            assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} <= {"int8", "uint8", "float32"}


def test_only_ids_outside_a_table_are_nan() -> None:
    q = aq.quantize(W, "int8")
    assert isinstance(q, aq.QTensor)
    with SWITCHES[NANS](), pytest.raises(FloatingPointError):
        aq.qembed(q, jnp.array([6], jnp.int32))
