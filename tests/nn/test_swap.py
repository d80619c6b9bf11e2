"""quantize_module: which layers it replaces, under which names, and what the new model computes and keeps."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compilations
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from aq_jax import AqError, ConfigError, Override, QTensor, QuantizationConfig, dequantize, quantize
from aq_jax.core.prepared import Prepared, to_qtensor
from aq_jax.nn import QEmbed, QLinear, quantize_module
from aq_jax.nn.swap import quantized_layer
from aq_jax.ops.kernels import VARIABLE
from aq_jax.quantizers.tile_programs import solve_tile

WIDTH, WORDS = 16, 32


class Model(nnx.Module):
    """Every kind of layer that is replaced, and some that are not."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, 3, rngs=rngs)
        self.feed = nnx.Sequential(nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.gelu,
                                   nnx.Linear(3 * WIDTH, WIDTH, use_bias=False, rngs=rngs))  # fmt: skip
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.zeroth = self.layers[0]  # shared by two parents
        self.adapted = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)
        self.other_axis = nnx.LinearGeneral(3, 3, axis=1, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.words(ids)
        x = self.norm(x + self.attention(x))
        x = x + self.feed(self.conv(x))
        for layer in self.layers:
            x = x + layer(x)
        return self.words.attend(self.adapted(self.zeroth(x)))


def make() -> Model:
    """Filled by NumPy: JAX would compile a generator for each shape."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    rng = np.random.default_rng(3)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.25, leaf.shape), leaf.dtype), state))


def ones(inputs: int, outputs: int, **options: Any) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0), **options)


@nnx.jit
def run(model: Model, ids: jax.Array) -> jax.Array:
    return model(ids)


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


NAMES = [
    "attention.key.kernel",
    "attention.out.kernel",
    "attention.query.kernel",
    "attention.value.kernel",
    "feed.layers.0.kernel",
    "feed.layers.2.kernel",
    "layers.0.kernel",
    "layers.1.kernel",
    "words.embedding",
]
IDS = jnp.arange(12).reshape(2, 6) * 7 % WORDS


def kinds(model: nnx.Module) -> dict[str, str]:
    return {".".join(map(str, path)): type(module).__name__ for path, module in nnx.iter_modules(model)}


def at(model: Any, name: str) -> Any:
    """The layer that has this weight."""
    for part in name.split(".")[:-1]:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def values(model: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(model))


def weights(model: nnx.Module) -> list[QTensor]:
    kinds = (QTensor, Prepared)
    leaves = jax.tree.leaves(values(model), is_leaf=lambda leaf: isinstance(leaf, kinds))
    return [to_qtensor(leaf) for leaf in leaves if isinstance(leaf, kinds)]


def relative(found: Any, wanted: Any) -> float:
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


@pytest.fixture(scope="module")
def model() -> Model:
    return make()


@pytest.fixture(scope="module")
def quantized(model: Model) -> Model:
    return quantize_module(model, "int8", activations="float32")


def test_linear_layers_and_embeddings_are_replaced_and_nothing_else(model: Model, quantized: Model) -> None:
    before, after = kinds(model), kinds(quantized)
    swapped = {name.rpartition(".")[0] for name in NAMES}
    # The shared layer is met under one of its two names.
    assert before.keys() == after.keys()
    assert len({"layers.0", "zeroth"} & before.keys()) == 1
    for name, kind in after.items():
        if name in swapped or name == "zeroth":
            assert kind == ("QEmbed" if name == "words" else "QLinear"), name
        else:
            assert kind == before[name], name
    assert {"LoRALinear", "LinearGeneral", "Conv", "LayerNorm", "MultiHeadAttention"} <= set(after.values())
    assert isinstance(quantized, Model)


def test_the_weights_are_those_of_quantize_and_the_biases_stay(model: Model, quantized: Model) -> None:
    for name in ("attention.query.kernel", "attention.out.kernel", "feed.layers.2.kernel", "words.embedding"):
        old, new = at(model, name), at(quantized, name)
        if isinstance(new, QEmbed):
            weight, found = old.embedding.get_value(), new.qtensor
        else:
            weight, found = old.kernel.get_value(), new.qtensor
            outputs = old.out_features if isinstance(old.out_features, tuple) else (old.out_features,)
            assert (new.inputs, new.outputs) == (weight.shape[: -len(outputs)], outputs)
            weight = weight.reshape(-1, np.prod(outputs)).T
            assert (old.bias is None) == (new.bias is None)
            assert new.bias is None or np.array_equal(new.bias.get_value(), old.bias.get_value())
        assert same(found, quantize(weight, "int8")), name
        assert new.activations == "float32"


def test_a_shared_layer_stays_shared(quantized: Model) -> None:
    assert quantized.zeroth is quantized.layers[0]
    assert quantized.zeroth is not quantized.layers[1]
    assert len(weights(quantized)) == len(NAMES)


def test_the_given_model_stays_as_it_is() -> None:
    class Counting(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = ones(WIDTH, WIDTH)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.norm(self.linear(x)))

    model = Counting(nnx.Rngs(0))
    before, kinds_before = values(model), kinds(model)
    for config in ("int8", "fp16", "none"):
        copy = quantize_module(model, config)
        # Neither does the copy change it later: it shares no state with it.
        copy(jnp.arange(2.0 * WIDTH).reshape(2, WIDTH))
        copy.norm.scale.set_value(jnp.zeros(WIDTH))
        assert kinds(model) == kinds_before
        assert jax.tree.all(jax.tree.map(operator.is_, before, values(model)))


@pytest.mark.parametrize(
    ("config", "limit", "activations"),
    [
        ("int8", 0.02, "float32"),
        ("int8", 0.02, "bfloat16"),
        (QuantizationConfig("int4", group_size=16, solver="absmax"), 0.3, "int8"),
    ],
    ids=["int8-float32", "int8-bfloat16", "int4-int8"],
)
def test_outputs_are_close_to_the_float_model(config: Any, limit: float, activations: Any, model: Model) -> None:
    wanted = run(model, IDS)
    copy = quantize_module(model, config, activations=activations)
    assert 1e-4 < relative(run(copy, IDS), wanted) < limit
    # The rounding of weights alone, in float layers.
    rounded = make()
    for name in NAMES:
        new, old = at(copy, name), at(rounded, name)
        if isinstance(new, QEmbed):
            old.embedding.set_value(dequantize(new.table.get_value()))
        else:
            old.kernel.set_value(dequantize(new.weight.get_value()).T.reshape(old.kernel.shape))
    assert relative(run(copy, IDS), run(rounded, IDS)) < (1e-5 if activations == "float32" else 0.02)


def test_the_whole_model_may_be_one_layer() -> None:
    x = jnp.ones((2, WIDTH))
    linear = ones(WIDTH, 8)
    layer = quantize_module(linear, "int8", activations="float32")
    assert isinstance(layer, QLinear)
    assert relative(layer(x), linear(x)) < 0.01
    assert isinstance(quantize_module(make().words, "int8"), QEmbed)
    kept = quantize_module(linear, QuantizationConfig("int8", overrides=(Override("^kernel$", quant_type="none"),)))
    assert type(kept) is nnx.Linear
    assert isinstance(quantize_module(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), "int8"), nnx.LayerNorm)


def test_a_model_that_is_quantized_already_stays(quantized: Model) -> None:
    again = quantize_module(quantized, "int4")
    assert kinds(again) == kinds(quantized)
    assert nnx.split(again)[0] == nnx.split(quantized)[0]


def test_names_are_paths(model: Model) -> None:
    config = QuantizationConfig(
        "int4",
        group_size=WIDTH,
        solver="absmax",
        mixed_precision_layers=("attention.out", "words"),
        overrides=(
            Override(pattern=r"^feed\.layers\.0\.kernel$", quant_type="none"),
            Override(pattern=r"^layers\.\d\.|zeroth", quant_type="int8", group_size=0, per_channel=True),
        ),
    )
    copy = quantize_module(model, config)
    bits = {name: at(copy, name).qtensor.spec.bits for name in NAMES if isinstance(at(copy, name), QLinear)}
    assert bits == {
        "attention.key.kernel": 4,
        "attention.query.kernel": 4,
        "attention.value.kernel": 4,
        "feed.layers.2.kernel": 4,
        "layers.0.kernel": 8,
        "layers.1.kernel": 8,
    }
    assert type(copy.feed.layers[0]) is nnx.Linear
    assert copy.feed.layers[0].kernel.dtype == jnp.float32
    for layer, key, original in (
        (copy.attention.out, "kernel", model.attention.out),
        (copy.words, "embedding", model.words),
    ):
        half, full = getattr(layer, key), getattr(original, key)
        assert (type(layer), half.dtype, full.dtype) == (type(original), jnp.float16, jnp.float32)
        assert np.array_equal(half.get_value(), full.get_value().astype(jnp.float16))
    y = run(copy, IDS)
    assert y.dtype == jnp.float32
    assert relative(y, run(model, IDS)) < 0.3


def test_what_is_kept_keeps_its_metadata_and_is_no_copy() -> None:
    model = ones(4, 4, kernel_metadata={"note": "mine"})
    half = quantize_module(model, "fp16")
    assert (half.kernel.dtype, half.kernel.note) == (jnp.float16, "mine")
    kept = quantize_module(model, "none")
    assert kept.kernel.note == "mine"
    assert kept.kernel.get_value() is model.kernel.get_value()


def test_parameters_keep_the_sharding_that_they_are_annotated_with() -> None:
    """As [outputs, inputs]; Flax's own functions read it."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("heads", "model"),)
    with jax.set_mesh(mesh):
        model = nnx.Dict(
            linear=nnx.Linear(
                8, 16, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("data", "model")},
                bias_metadata={"out_sharding": ("model",)},
            ),
            named=nnx.Linear(8, 8, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": jax.P(None, "model")}),
            heads=nnx.LinearGeneral(
                8, (2, 4), rngs=nnx.Rngs(0),
                kernel_metadata={"out_sharding": (None, "heads", None), "sharding_rules": rules},
            ),
            words=nnx.Embed(16, 8, rngs=nnx.Rngs(0), embedding_metadata={"out_sharding": ("model", None)}),
            plain=nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
        )  # fmt: skip
        quantized = quantize_module(model, "int8")
    found = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(quantized)))
    assert found == {
        "linear": {"weight": jax.P("model", "data"), "bias": jax.P("model")},
        "named": {"weight": jax.P("model", None), "bias": jax.P()},
        "heads": {"weight": jax.P("model", None), "bias": jax.P()},
        "words": {"table": jax.P("model", None)},
        "plain": {"weight": jax.P(), "bias": jax.P()},
    }
    assert model.linear.kernel.out_sharding == ("data", "model")
    wrong = nnx.Sequential(nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0)))
    wrong.layers[0].kernel.set_metadata("out_sharding", (None, None, "model"))
    with pytest.raises(
        ConfigError, match=r"layers\.0\.kernel: out_sharding = \(None, None, 'model'\): cuts another than"
    ):
        quantize_module(wrong, "int8")


def test_weights_that_cannot_be_quantized_are_named(model: Model) -> None:
    broken = nnx.clone(model)
    kernel = broken.feed.layers[2].kernel
    kernel.set_value(kernel.get_value().at[3, 2].set(jnp.nan))
    with pytest.raises(
        AqError, match=r"^feed\.layers\.2\.kernel: 1 of 768 values are not finite \(first at \[2, 3\]\)"
    ):
        quantize_module(broken, "int8")
    kept = quantize_module(broken, QuantizationConfig("int8", on_nonfinite="keep"))
    assert type(kept.feed.layers[2]) is nnx.Linear
    assert isinstance(kept.feed.layers[0], QLinear)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_layer_s_own_dtype_stays(dtype: str | None) -> None:
    def dtypes(model: Any) -> list[Any]:
        """Of what comes out of each layer for inputs in float32 and bfloat16; layers are shapes only."""
        linear, embed = model.layers
        outputs = [layer for x in (wide, narrow) for layer in (linear(x), embed.attend(x))]
        return [y.dtype for y in (*outputs, embed(jnp.zeros(2, int)))]

    def both() -> None:
        options = {"dtype": dtype, "param_dtype": dtype or "float32", "rngs": nnx.Rngs(0)}
        model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, **options), nnx.Embed(WIDTH, WIDTH, **options))
        wanted, found = dtypes(model), dtypes(quantize_module(model, "int8"))
        # Without a dtype, QLinear keeps that of its inputs.
        assert found == (wanted if dtype else [*wanted[:2], "bfloat16", *wanted[3:]])

    wide, narrow = jnp.ones((2, WIDTH)), jnp.ones((2, WIDTH), jnp.bfloat16)
    nnx.eval_shape(both)


def dot_as_usual(*args: Any, **options: Any) -> jax.Array:
    return jax.lax.dot_general(*args, **options)


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: ones(WIDTH, WIDTH, dot_general=dot_as_usual), "Linear has its own dot_general; wanted the defa"),
        (lambda: ones(WIDTH, WIDTH, promote_dtype=lambda x, **_: x), "Linear has its own promote_dtype"),
        (lambda: ones(WIDTH, WIDTH, preferred_element_type="float32"), "Linear has its own preferred_element_type"),
        (lambda: ones(WIDTH, WIDTH, dtype="complex64"), "Linear of dtype complex64; wanted a floating one"),
        (
            lambda: nnx.LinearGeneral(WIDTH, WIDTH, dot_general_cls=lambda: dot_as_usual, rngs=nnx.Rngs(0)),
            "LinearGeneral has its own dot_general_cls",
        ),
        (
            lambda: nnx.Embed(WIDTH, WIDTH, promote_dtype=lambda x, **_: x, rngs=nnx.Rngs(0)),
            "Embed has its own promote_dtype",
        ),
    ],
)
def test_layers_that_compute_by_functions_of_their_own_are_refused(make_layer: Any, message: str) -> None:
    model = nnx.Sequential(nnx.relu, make_layer())
    with pytest.raises(
        ConfigError, match=rf"^layers\.1\.\w+: {message}.*; or keep it by an override, quant_type = 'none'$"
    ):
        quantize_module(model, "int8")
    assert type(quantize_module(model, "none").layers[1]) is type(model.layers[1])


def test_weights_that_no_integers_multiply_are_refused_by_name(model: Model) -> None:
    config = QuantizationConfig("int8", overrides=(Override("feed.layers.0", group_size=12),))
    with pytest.raises(
        ConfigError, match=r"^feed\.layers\.0\.kernel: QLinear: activations = 'int8' needs grids that ea"
    ):
        quantize_module(model, config, activations="int8")
    config = QuantizationConfig("int8", overrides=(Override("words", group_size=12),))
    with pytest.raises(ConfigError, match=r"^words\.embedding: QEmbed: activations = 'int8' needs grids that each lie"):
        quantize_module(model, config, activations="int8")
    quantize_module(model, config)


def test_an_abstract_model_has_the_graph_of_the_concrete_one(quantized: Model) -> None:
    abstract = nnx.eval_shape(lambda: quantize_module(make(), "int8", activations="float32"))
    graph, state = nnx.split(abstract)
    assert graph == nnx.split(quantized)[0]
    # `make` made the weights in there; a model that is abstract already serves as well.
    later = nnx.eval_shape(lambda model: quantize_module(model, "int8", activations="float32"), nnx.eval_shape(make))
    assert nnx.split(later)[0] == graph
    for one in (state, nnx.state(later)):
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(one))
        assert jax.tree.all(
            jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), one, nnx.state(quantized))
        )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("int8", id="int8", marks=pytest.mark.slow),
        pytest.param(QuantizationConfig("int4", group_size=16, solver="absmax"), id="int4"),
    ],
)
def test_state_goes_through_orbax(config: QuantizationConfig | str, tmp_path: Path, model: Model) -> None:
    saved = quantize_module(model, config)
    ocp.save(tmp_path / "state", values(saved))
    graph, state = nnx.split(nnx.eval_shape(lambda: quantize_module(make(), config)))
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, ocp.load(tmp_path / "state", shapes))
    loaded = nnx.merge(graph, state)
    assert same(values(loaded), values(saved))
    assert [q.spec for q in weights(loaded)] == [q.spec for q in weights(saved)]
    assert np.array_equal(run(loaded, IDS), run(saved, IDS))


def test_more_layers_compile_no_more(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "xla")  # the native library compiles nothing

    def stack(layers: int) -> nnx.Sequential:
        return nnx.Sequential(*(ones(24, 24) for _ in range(layers)))

    config = QuantizationConfig("int4", group_size=24, symmetric=False, solver="minmax")
    before = solve_tile._cache_size()
    quantize_module(stack(1), config)
    one = solve_tile._cache_size()
    assert one > before  # it is this that compiles
    with compilations() as programs:
        quantize_module(stack(7), config)
    assert solve_tile._cache_size() == one
    assert not programs


@pytest.mark.parametrize("bits", [8, 3])
def test_weights_stay_packed(bits: int, model: Model) -> None:
    copy = quantize_module(model, QuantizationConfig(f"int{bits}", group_size=WIDTH, solver="absmax"))
    elements = 4 * WIDTH**2 + 2 * 3 * WIDTH**2 + 2 * WIDTH**2 + WORDS * WIDTH
    assert sum(q.nbytes for q in weights(copy)) == elements * bits // 8 + 8 * elements // WIDTH
    assert sum(q.size for q in weights(copy)) == elements
    # Nothing else of the layers is left, such as a float kernel beside the codes.
    for name in NAMES:
        arrays = jax.tree.leaves(nnx.state(at(copy, name)))
        assert len(arrays) == 3 + (getattr(at(copy, name), "bias", None) is not None)


def test_a_weight_of_another_shape_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"^QLinear: weight of shape \[16, 48\] does not fit \(16,\) -> \(48,\)$"):
        quantized_layer(model.feed.layers[0], quantize(np.ones((WIDTH, 3 * WIDTH), np.float32), "int8"), "float32")
    with pytest.raises(ValueError, match=r"weight of shape \[16, 8\] does not fit \(16,\) -> \(2, 8\)$"):
        quantized_layer(model.attention.query, quantize(np.ones((WIDTH, 8), np.float32), "int8"), "float32")


def test_a_model_of_shapes_only_is_refused() -> None:
    model = nnx.eval_shape(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match="found shapes without weights; wanted weights"):
        quantize_module(model, "int8")
