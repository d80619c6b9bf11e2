"""The quantized tensor as a pytree: what jit, vmap, scan, eval_shape and friends make of it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from aq_jax import ConfigError, QTensor, QuantizationConfig, dequantize, quantize
from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream
from aq_jax.core.qtensor import _from_json, _to_json, from_groups, scale_shape, to_groups

INT4 = QuantizationConfig(quant_type="int4", group_size=16, solver="absmax")
FLAT = QuantizationConfig(quant_type="int4", group_size=24, solver="absmax")  # groups that cross rows of 64
TENSOR = QuantizationConfig(quant_type="int8", per_channel=False)


@pytest.fixture
def q(weight: np.ndarray) -> QTensor:
    return quantize(weight, INT4)


# shape, spec -> shape of the scales, by row
SHAPES = [
    pytest.param((6, 64), QuantSpec(4, group_size=16), (6, 4), True, id="groups divide rows"),
    pytest.param((6, 64), QuantSpec(4, group_size=64), (6, 1), True, id="a group is a row"),
    pytest.param((6, 64), QuantSpec(4, group_size=128), (3,), False, id="a group is two rows"),
    pytest.param((6, 64), QuantSpec(4, group_size=24), (16,), False, id="groups cross rows"),
    pytest.param((5, 7), QuantSpec(4, group_size=4), (9,), False, id="the last group is short"),
    pytest.param((6, 64), QuantSpec(8, per_channel=True), (6, 1), True, id="channels"),
    pytest.param((6, 4, 8), QuantSpec(8, per_channel=True), (6,), False, id="channels of two axes"),
    pytest.param((6, 64), QuantSpec(8), (1,), False, id="tensor"),
    pytest.param((1, 64), QuantSpec(8), (1, 1), True, id="tensor of one row"),
    pytest.param((2, 3), QuantSpec(4, group_size=128), (1,), False, id="a group larger than the tensor"),
    pytest.param((7,), QuantSpec(4, group_size=3), (3,), False, id="one axis"),
    pytest.param((8,), QuantSpec(4, group_size=4), (2,), True, id="one axis, divided"),
    pytest.param((0, 8), QuantSpec(4, group_size=4), (0,), False, id="no rows, groups"),
    pytest.param((0, 8), QuantSpec(8, per_channel=True), (0,), False, id="no rows, channels"),
    pytest.param((3, 0), QuantSpec(8, per_channel=True), (3,), False, id="rows of nothing"),
]


@pytest.mark.parametrize(("shape", "spec", "grids", "by_row"), SHAPES)
def test_where_scales_lie(shape: tuple[int, ...], spec: QuantSpec, grids: tuple[int, ...], by_row: bool) -> None:
    assert scale_shape(shape, spec) == grids
    q = QTensor(np.zeros(shape, np.int8), np.ones(grids, np.float32), np.zeros(grids, np.float32), spec, shape[-1])
    if q.size:
        assert q.by_row is by_row
    assert q.shape == shape
    assert len(oracle.groups_of(np.zeros(shape), spec.per_channel, spec.group_size) if q.size else grids) in (
        np.prod(grids), len(grids))  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 7), (6, 8), (1, 1), (3,)], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4, group_size=4), QuantSpec(8, per_channel=True), QuantSpec(8)], ids=str)
def test_to_groups_cuts_the_flattened_tensor(shape: tuple[int, ...], spec: QuantSpec) -> None:
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    rows, pads = to_groups(jnp.asarray(w), spec)
    wanted = oracle.groups_of(w, spec.per_channel, spec.group_size)
    found = np.asarray(rows).reshape(len(wanted), -1)
    for row, pad, group in zip(found, pads.reshape(-1).astype(int), wanted, strict=True):
        assert row[: row.size - pad].tolist() == group.tolist()
        assert (row[row.size - pad :] == group[-1]).all()  # a filling that changes no range
    assert np.array_equal(from_groups(rows, shape), w)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (7,), (0, 8), (2, 2, 3)], ids=str)
def test_from_stream_reads_the_format(bits: int, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    qmin, qmax = oracle.code_range(bits)
    spec = QuantSpec(bits, group_size=4)
    codes = rng.integers(qmin, qmax + 1, shape)
    stream = np.frombuffer(oracle.pack(codes.ravel().tolist(), bits), np.uint8)
    count = spec.group_count(shape)
    scales, zeros = rng.random(count).astype(np.float32), rng.random(count).astype(np.float32)
    q = from_stream(stream, scales, zeros, shape, spec)
    assert q.shape == shape
    assert np.array_equal(oracle.codes_of(q), codes)
    assert q.packed is (bits < 8 and shape[-1] * bits % 8 == 0)
    assert np.array_equal(dequantize(q), oracle.dequantize(codes, scales, zeros, shape, group_size=4))


def test_properties(q: QTensor) -> None:
    assert (q.shape, q.ndim, q.size, q.dtype) == ((6, 64), 2, 384, np.float32)
    assert q.packed
    assert q.codes.shape == (6, 32)
    assert q.nbytes == 192 + 2 * 4 * 24
    assert repr(q) == "QTensor(int4[6, 64], QuantSpec(bits=4, per_channel=False, group_size=16, rotation=0))"


def test_jit_does_not_retrace_for_an_equal_tensor(q: QTensor, weight: np.ndarray) -> None:
    traces = []

    @jax.jit
    def f(q: QTensor) -> jax.Array:
        traces.append(q.shape)
        return dequantize(q)

    f(q)
    spec = QuantizationConfig(quant_type="int4", group_size=16, solver="absmax")
    f(quantize(2 * weight, spec))
    assert traces == [(6, 64)]
    host = from_stream(
        np.asarray(q.codes).reshape(-1), np.asarray(q.scale).ravel(), np.asarray(q.zero_point).ravel(), q.shape, q.spec
    )
    assert jax.tree.structure(host) == jax.tree.structure(q)
    f(jax.device_put(host))
    assert len(traces) == 1


def test_what_an_exported_program_keeps_of_a_tensor_is_what_it_was() -> None:
    spec = QuantSpec(4, group_size=16)
    old = b'{"spec": {"bits": 4, "per_channel": false, "group_size": 16, "rotation": 0}, "length": 64}'
    assert _from_json(old) == (spec, 64, None)
    assert _to_json((spec, 64, None)) == old
    assert _from_json(_to_json((QuantSpec(4, code="levels"), 64, 16))) == (QuantSpec(4, code="levels"), 64, 16)


def test_a_code_has_one_spelling() -> None:
    assert QuantSpec(4, code="int4") == QuantSpec(4)
    with pytest.raises(ConfigError, match=r"code='levels'\): there is no code 'levels'; known are int8"):
        _ = QuantSpec(4, code="levels").coding


def test_the_structure_knows_numerics_and_length(q: QTensor, weight: np.ndarray) -> None:
    same = jax.tree.structure(quantize(weight + 1, INT4))
    assert jax.tree.structure(q) == same
    assert hash(jax.tree.structure(q)) == hash(same)
    assert jax.tree.structure(q) != jax.tree.structure(quantize(weight, FLAT))
    assert jax.tree.structure(q) != jax.tree.structure(quantize(weight[:, :32], INT4))


@pytest.mark.parametrize("leaf", [None, object(), "text", 0], ids=lambda leaf: type(leaf).__name__)
def test_leaves_may_be_anything_while_a_tree_is_rebuilt(q: QTensor, leaf: object) -> None:
    mapped = jax.tree.map(lambda _: leaf, q)
    assert (mapped.codes, mapped.scale, mapped.spec, mapped.length) == (leaf, leaf, q.spec, q.length)


def test_paths_name_the_fields(q: QTensor) -> None:
    paths = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == ["codes", "scale", "zero_point"]


def test_eval_shape(weight: np.ndarray) -> None:
    abstract = jax.eval_shape(lambda w: quantize(w, INT4), jax.ShapeDtypeStruct(weight.shape, jnp.float32))
    assert isinstance(abstract, QTensor)
    assert (abstract.shape, abstract.codes.dtype, abstract.scale.shape) == ((6, 64), np.uint8, (6, 4))
    assert jax.eval_shape(dequantize, abstract).shape == (6, 64)


def test_vmap_over_a_batch(weight: np.ndarray) -> None:
    batch = jnp.stack([weight, -weight, 3 * weight])
    q = jax.vmap(lambda w: quantize(w, INT4))(batch)
    assert q.shape == (3, 6, 64)
    assert q.by_row
    # Grids that lie by row stay right with any number of leading axes; with or without vmap.
    assert np.array_equal(dequantize(q), jax.vmap(dequantize)(q))
    assert np.array_equal(dequantize(q)[1], dequantize(quantize(-weight, INT4)))


@pytest.mark.parametrize("config", [FLAT, TENSOR], ids=["groups that cross rows", "tensor"])
def test_a_batch_with_flat_grids_is_not_dequantized_wrongly(config: QuantizationConfig, weight: np.ndarray) -> None:
    batch = jnp.stack([jnp.asarray(weight), -10 * weight, 3 * weight])
    q = jax.vmap(lambda w: quantize(w, config))(batch)
    wanted = [dequantize(quantize(w, config)) for w in batch]
    assert np.array_equal(jax.vmap(dequantize)(q), jnp.stack(wanted))
    # Taken as one tensor, the flat grids of three would be read as those of one.
    with pytest.raises(ValueError, match="vmap"):
        dequantize(q)


def test_scan_over_layers(weight: np.ndarray) -> None:
    batch = jnp.stack([jnp.asarray(weight), -weight])
    layers = jax.vmap(lambda w: quantize(w, FLAT))(batch)
    _, values = jax.lax.scan(lambda carry, q: (carry, dequantize(q)), 0, layers)
    assert np.array_equal(values, jax.vmap(dequantize)(layers))


def test_rows_can_be_taken(q: QTensor) -> None:
    rows = jax.tree.map(lambda leaf: leaf[jnp.array([4, 1])], q)
    assert rows.shape == (2, 64)
    assert np.array_equal(dequantize(rows), dequantize(q)[jnp.array([4, 1])])
    row = jax.tree.map(lambda leaf: leaf[3], q)
    assert np.array_equal(dequantize(row), dequantize(q)[3])


def test_device_put_copy_and_pickle(q: QTensor) -> None:
    host = jax.device_get(q)
    assert isinstance(host.codes, np.ndarray)
    for other in (jax.device_put(host), copy.deepcopy(q), pickle.loads(pickle.dumps(host))):
        assert jax.tree.structure(other) == jax.tree.structure(q)
        assert all(map(np.array_equal, jax.tree.leaves(other), jax.tree.leaves(q)))


def test_sharding_along_rows(q: QTensor) -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("rows", None))
    sharded = jax.device_put(q, sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(sharded))
    assert np.array_equal(dequantize(sharded), dequantize(q))


def test_a_tensor_is_frozen(q: QTensor) -> None:
    with pytest.raises(AttributeError):
        q.length = 3  # type: ignore[misc]


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import aq_jax as aq

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
q = aq.quantize(w, aq.QuantizationConfig("int4", group_size=64, solver="absmax"))
rows = jax.device_put(q, NamedSharding(mesh, PartitionSpec("x", None)))
whole = aq.dequantize(q)
assert {s.data.shape for s in rows.codes.addressable_shards} == {(16, 128)}
assert (aq.dequantize(rows) == whole).all()
assert (aq.qembed(rows, jnp.array([1, 17, 63])) == whole[jnp.array([1, 17, 63])]).all()
assert jnp.allclose(aq.qdot(jnp.ones((3, 256)), rows), jnp.ones((3, 256)) @ whole.T, atol=1e-4)
"""


def test_a_tensor_sharded_over_devices_is_the_same_tensor() -> None:
    """In a process of its own: how many devices there are is settled when JAX starts."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", SHARDED], env=env, check=True, timeout=120)
