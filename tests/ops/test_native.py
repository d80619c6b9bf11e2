"""The native kernels: NumPy's numbers, XLA's codes, and nothing that depends on batches, padding or threads."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import aq_jax as aq
from aq_jax import QuantizationConfig, dequantize, native, prepare, qdot, qembed, quantize
from aq_jax.codes.bits import unpack_codes
from aq_jax.codes.bits_jax import pack
from aq_jax.codes.rotation import rotate_rows
from aq_jax.core.prepared import to_qtensor
from aq_jax.core.qtensor import QTensor
from aq_jax.ops import ACTS, Epilogue, Scores, attention, linear, native_panels, xla, xla_attention
from aq_jax.ops.native import Attention
from aq_jax.ops.native_calls import quantize_rows

STATUS = native.load()
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"no native kernels: {STATUS.reason}"),
    pytest.mark.usefixtures("unforced"),
]

# (outputs, inputs, inputs of a group): no multiples of a vector, one output, groups of 16 to a whole row.
SHAPES = [(1, 4, 4), (17, 50, 50), (40, 96, 16), (5, 60, 20), (33, 21, 7)]
ROWS = (33, 1, 7, 33, 7)  # with each of them: every new shape is another program
WIDTHS = (2, 3, 4, 5, 6, 8)
# Each width with groups of whole rows and of parts of them, and groups that fill no chunk of codes.
NARROW = [(2, 40, 96, 16), (3, 17, 50, 50), (4, 33, 300, 150), (5, 70, 160, 32), (6, 5, 60, 20), (4, 1, 40, 8)]
EPSILON = np.float32(2.0**-23)


each_isa = pytest.mark.usefixtures("isa")


def weight(
    outputs: int, inputs: int, size: int, rotate: bool = False, symmetric: bool = False, bits: int = 8
) -> QTensor:
    w = np.random.default_rng(outputs).normal(0.5, size=(outputs, inputs)).astype(np.float32)
    groups: dict[str, Any] = {"per_channel": True} if size == inputs else {"per_channel": False, "group_size": size}
    solver = "absmax" if symmetric else "minmax"
    q = quantize(w, QuantizationConfig(f"int{bits}", symmetric=symmetric, rotate=rotate, solver=solver, **groups))
    assert isinstance(q, QTensor)
    return q


def inputs_of(rows: int, inputs: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    return (rng.normal(size=(rows, inputs)) * rng.lognormal(size=(rows, 1)) + rng.normal()).astype(np.float32)


def codes_of(q: QTensor) -> np.ndarray:
    codes = np.asarray(q.codes)
    return (unpack_codes(codes.reshape(-1), q.spec.bits, q.size) if q.packed else codes).astype(np.float64)


def product_in_float64(x: np.ndarray, q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """Multiply the codes of both sides; return the product, and the largest term and sum on the way."""
    codes, scale, offset = (np.asarray(part, np.float64) for part in jax.jit(xla.quantize_rows)(jnp.asarray(x)))
    outputs = q.shape[0]
    groups = q.scale.shape[-1]
    qw = codes_of(q).reshape(outputs, groups, -1)
    sw, zw = (np.asarray(grid, np.float64).reshape(outputs, groups) for grid in (q.scale, q.zero_point))
    qx = codes.reshape(len(x), groups, -1)
    dot, sums = np.einsum("rgi,ogi->rog", qx, qw), qx.sum(-1)[:, None]
    terms = [scale[..., None] * sw * dot, -scale[..., None] * sw * zw * sums, offset[..., None] * sw * qw.sum(-1)]
    terms.append(-offset[..., None] * sw * zw * qw.shape[-1])
    terms.append(np.cumsum(sum(terms), -1))
    return terms[-1][..., -1], np.max([np.abs(term).max(-1) for term in terms], axis=0)


@each_isa
@pytest.mark.parametrize("block", [2, 4, 32, 64, 512])
def test_inputs_are_rotated_as_weights_are(block: int) -> None:
    x = inputs_of(7, 512)
    codes, scale, offset = (np.asarray(part, np.float64) for part in quantize_rows(jnp.asarray(x), block))
    wanted = rotate_rows(x.astype(np.float64), block)
    step = np.ptp(wanted, axis=1, keepdims=True) / 255
    np.testing.assert_allclose(scale[:, None], step, rtol=1e-5)
    assert (np.abs(codes * scale[:, None] + offset[:, None] - wanted) < 0.5001 * step).all()
    np.testing.assert_array_equal(codes[3], np.asarray(quantize_rows(jnp.asarray(x[3:4]), block)[0])[0])


@each_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_finite_product_and_harms_no_other(bad: float) -> None:
    w = prepare(weight(17, 50, 50), activations="int8")
    x = inputs_of(3, 50)
    good = np.asarray(qdot(x, w, "int8"))
    x[1, 49] = bad
    found = np.asarray(qdot(x, w, "int8"))
    assert not np.isfinite(found[1]).any()
    np.testing.assert_array_equal(found[[0, 2]], good[[0, 2]])
    for act in ACTS:
        assert not np.isfinite(linear(x, w, "int8", Epilogue(act=act))[1]).any(), act


@each_isa
@pytest.mark.parametrize(
    ("bits", "shape", "rows"),
    [
        *((8, shape, rows) for shape, rows in zip(SHAPES, ROWS, strict=True)),
        *((case[0], case[1:], rows) for case, rows in zip(NARROW, (33, 1, 7, 2, 1, 33), strict=True)),
    ],
)
def test_products_are_exact_up_to_the_last_places_of_floats(bits: int, shape: tuple[int, int, int], rows: int) -> None:
    q, x = weight(*shape, symmetric=rows == 1, bits=bits), inputs_of(rows, shape[1])
    w = prepare(q, activations="int8")
    assert w.kernel == "native"
    wanted, largest = product_in_float64(x, q)
    np.testing.assert_array_less(np.abs(qdot(x, w, "int8") - wanted), 4 * EPSILON * largest + 1e-30)
    # Of floats, each row may be rounded to 24 bits of the largest of it.
    scale, zeros = (np.asarray(grid, np.float64).reshape(shape[0], -1, 1) for grid in (q.scale, q.zero_point))
    values = (scale * (codes_of(q).reshape(*scale.shape[:2], -1) - zeros)).reshape(shape[:2])
    most = np.abs(x).max(1, keepdims=True) * np.abs(values).sum(1)
    np.testing.assert_array_less(np.abs(qdot(x, w) - x.astype(np.float64) @ values.T), EPSILON * most + 1e-30)


@each_isa
@pytest.mark.parametrize("bits", WIDTHS)
def test_sums_of_the_largest_products_do_not_overflow(bits: int) -> None:
    q, x = weight(16, 512, 512, bits=bits), np.full((7, 512), -1, np.float32)
    codes = jnp.full(q.shape, 2 ** (bits - 1) - 1, jnp.int8)
    q = dataclasses.replace(q, codes=pack(codes, bits) if q.packed else codes)
    x[:, 0] = 1  # the others are codes of -128
    w, (wanted, largest) = prepare(q), product_in_float64(x, q)
    for rows in (1, 7):
        np.testing.assert_array_less(np.abs(qdot(x[:rows], w, "int8") - wanted[:rows]), 4 * EPSILON * largest[:rows])


@each_isa
@pytest.mark.parametrize("bits", [8, 3])
def test_products_with_rotated_weights_are_near_those_of_float64(bits: int) -> None:
    q, x = weight(40, 64, 32, rotate=True, bits=bits), inputs_of(7, 64)
    w = prepare(q, activations="int8")
    found = qdot(x, w, "int8")
    wanted = x.astype(np.float64) @ np.asarray(dequantize(q), np.float64).T
    largest = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 0.01 * largest
    np.testing.assert_allclose(found, qdot(x, q, "int8"), rtol=0, atol=0.005 * largest)
    np.testing.assert_allclose(qdot(x, w), wanted, rtol=0, atol=1e-6 * largest)


@each_isa
@pytest.mark.parametrize("size", [1e-28, 1e20, 1e34])
def test_float_inputs_may_be_small_and_large(size: float) -> None:
    """Beside zeros, and beside numbers of another size in the same group."""
    q, rng = weight(17, 256, 256, bits=4), np.random.default_rng(0)
    x = rng.normal(size=(2, 256)).astype(np.float32)
    x[0, 128:] = 0
    x[1, 128:] *= 1e-3
    wanted = x.astype(np.float64) @ np.asarray(dequantize(q), np.float64).T
    found = np.asarray(qdot(x * np.float32(size), prepare(q)), np.float64) / size
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@each_isa
@pytest.mark.parametrize("act", ACTS)
def test_what_follows_a_product_is_computed_with_it(act: str) -> None:
    q, x, rng = weight(33, 21, 21), inputs_of(7, 21), np.random.default_rng(0)
    bias, gain, shift = (jnp.asarray(rng.normal(size=33), jnp.float32) for _ in range(3))
    factor, residual = (jnp.asarray(rng.normal(size=(7, 33)), jnp.float32) for _ in range(2))
    y = qdot(x, prepare(q, activations="int8"), "int8")
    for after in (
        Epilogue(act=act),
        Epilogue(bias, act=act),
        Epilogue(None, factor, residual, act=act),
        Epilogue(bias, factor, residual, gain, shift, act, 1e-5),
    ):
        found, wanted = linear(x, prepare(q, activations="int8"), "int8", after), after.apply(y)
        largest = np.maximum(np.abs(wanted), np.abs(y).max() if after.gain is None else 1 + np.abs(shift))
        np.testing.assert_array_less(np.abs(found - wanted), 8 * EPSILON * largest)


@each_isa
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "silu"])
def test_activations_are_those_of_float64(act: str) -> None:
    """Through a product whose weight is the identity, of bias alone."""
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    q = weight(len(x), 4, 4)
    after = Epilogue(bias=jnp.asarray(x), act=act)
    found = np.asarray(linear(np.zeros((1, 4), np.float32), prepare(q, activations="int8"), "int8", after))[0]
    with jax.enable_x64(True):
        wanted = np.asarray(ACTS[act](jnp.asarray(x, jnp.float64)))
    np.testing.assert_array_less(np.abs(found - wanted), 4 * EPSILON * np.maximum(np.abs(x), 2.0**-10))


@each_isa
@pytest.mark.parametrize(("bits", "activations"), [(8, "int8"), (8, "float32"), (5, "int8"), (4, "float32")])
def test_a_rows_result_depends_on_no_other_row_and_on_no_thread(bits: int, activations: Any) -> None:
    w = prepare(weight(400, 384, 384 if bits == 8 else 128, bits=bits), activations=activations)
    x = inputs_of(600, 384)  # enough for several blocks, and for several threads
    after = Epilogue(act="gelu", gain=jnp.ones(400), shift=jnp.zeros(400), epsilon=1e-6)
    whole = np.asarray(linear(x, w, activations, after))
    for first, count in ((0, 1), (5, 7), (90, 33), (599, 1), (100, 200), (40, 3)):
        part = slice(first, first + count)
        np.testing.assert_array_equal(linear(x[part], w, activations, after), whole[part])


@pytest.mark.parametrize("bits", [8, 3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (6, 5, 4, 2))])
def test_rows_of_a_table_are_xlas_bit_for_bit(bits: int, isas: Callable[[], Iterator[str]]) -> None:
    for q in (weight(37, 50, 50, bits=bits), weight(40, 96, 16, bits=bits), weight(20, 64, 32, rotate=True, bits=bits)):
        table, ids = prepare(q, operation="rows"), np.array([[0, -1, q.shape[0]], [q.shape[0] - 1, 7, -100]])
        assert table.kernel == "native"
        found = qembed(table, ids)
        for isa in isas():
            np.testing.assert_array_equal(qembed(table, ids), qembed(q, ids), isa)
        np.testing.assert_array_equal(jax.vmap(lambda i, table=table: qembed(table, i))(ids), found)
        assert np.isnan(found[1, 2]).all()
    assert calls_of(jax.jit(qembed).lower(table, ids)) == 1
    assert qembed(table, np.zeros((0, 3), np.int32)).shape == (0, 3, 64)
    (count,) = export.symbolic_shape("count")
    exported = export.export(jax.jit(qembed))(table, jax.ShapeDtypeStruct((count,), np.int32))
    np.testing.assert_array_equal(exported.call(table, ids[0]), found[0])


def test_rows_of_a_table_have_derivatives() -> None:
    q, ids = weight(20, 64, 32, bits=4), np.array([3, 3, 0])

    def loss(scale: Any, kernel: str | None) -> Any:
        w = dataclasses.replace(q, scale=scale)
        return (qembed(w if kernel else prepare(w, operation="rows"), ids, kernel=kernel) ** 2).sum()

    found, wanted = (jax.grad(loss)(q.scale, kernel) for kernel in (None, "xla"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_table_is_held_once_for_rows_and_products() -> None:
    q, x, ids = weight(20, 64, 32, bits=4), inputs_of(3, 64), np.array([3, 0])
    for operation in ("product", "rows"):
        w = prepare(q, operation=operation)  # type: ignore[arg-type]
        assert (w.weight, w.kernel) == (None, "native")
        assert calls_of(jax.jit(lambda x, w: (qdot(x, w), qembed(w, ids))).lower(x, w)) == 2


@each_isa
@pytest.mark.parametrize("how", [Scores(), Scores(scale=0.5, cap=1.5, reach=6)], ids=["plain", "bounded"])
@pytest.mark.parametrize(("tokens", "width", "heads"), [(1, 4, 2), (16, 64, 2), (37, 40, 2), (70, 60, 3)])
def test_attention_is_that_of_float64(tokens: int, width: int, heads: int, how: Scores) -> None:
    rng = np.random.default_rng(tokens)
    q, k, v = (rng.normal(size=(3, tokens, width)).astype(np.float32) for _ in range(3))
    mask = np.arange(tokens) < np.array([[tokens], [max(1, tokens - 5)], [0]])
    mask[0, tokens // 2] = tokens == 1  # a hole
    found = attention(*map(jnp.asarray, (q, k, v, mask)), heads, jnp.float32, how)

    def split(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64).reshape(3, tokens, heads, -1).swapaxes(1, 2)

    scores = split(q) @ split(k).swapaxes(2, 3) * (how.scale or 1 / np.sqrt(width // heads))
    weights = np.exp(how.cap * np.tanh(scores / how.cap) if how.cap else scores) * mask[:, None, None]
    at = np.arange(tokens)
    weights *= np.abs(at[:, None] - at) <= (tokens if how.reach is None else how.reach)
    wanted = weights @ split(v) / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(found, wanted.swapaxes(1, 2).reshape(q.shape), rtol=0, atol=2e-6)


@each_isa
def test_attention_depends_neither_on_the_batch_nor_on_padding() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(40, 128, 64)), jnp.float32) for _ in range(3))
    lengths = rng.integers(1, 129, 40)
    mask = jnp.asarray(np.arange(128) < lengths[:, None])
    whole = attention(q, k, v, mask, 2, jnp.float32)
    for text in (0, 7, 39):
        length = lengths[text]
        for padded in (length, min(128, length + 13)):
            one = (x[text : text + 1, :padded] for x in (q, k, v, mask))
            np.testing.assert_array_equal(attention(*one, 2, jnp.float32)[0, :length], whole[text, :length])


@each_isa
def test_attention_hides_no_nan_and_sees_none_that_is_masked() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 9, 8)).astype(np.float32) for _ in range(3))
    mask = (np.arange(9)[None] != 4) & (np.arange(9)[None] < 7)
    for kernel in (Attention(), xla_attention.Attention()):
        wanted = np.asarray(kernel.run(*map(jnp.asarray, (q, k, v, mask)), 2, jnp.float32))
        bad_q, bad_k, bad_v = q.copy(), k.copy(), v.copy()
        bad_k[0, 4], bad_v[0, [4, 7, 8]], bad_q[0, 2] = np.nan, np.inf, np.nan
        found = np.asarray(kernel.run(*map(jnp.asarray, (bad_q, bad_k, bad_v, mask)), 2, jnp.float32))
        assert np.isnan(found[0, 2]).all()
        np.testing.assert_array_equal(np.delete(found, 2, 1), np.delete(wanted, 2, 1))
        nothing = (jnp.asarray(array[:, :0]) for array in (q, k, v, mask))
        assert kernel.run(*nothing, 2, jnp.float32).shape == (1, 0, 8)


def test_numbers_that_are_none_are_found_where_jax_looks_for_them() -> None:
    table = prepare(weight(17, 50, 50), operation="rows")
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        qembed(table, jnp.array([99]))
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        qdot(jnp.full((1, 50), 3e38), table)
    with jax.debug_nans(True):
        assert qembed(table, jnp.array([3])).shape == (1, 50)


def test_panels_give_the_weight_back_bit_for_bit() -> None:
    tensor = quantize(np.random.default_rng(0).normal(size=(5, 6)), QuantizationConfig("int8", per_channel=False))
    narrow = (weight(*case[1:], bits=case[0], rotate=case == (5, 70, 160, 32)) for case in NARROW)
    for i, q in enumerate((*narrow, tensor, weight(8, 64, 32, rotate=True), *(weight(*shape) for shape in SHAPES))):
        assert isinstance(q, QTensor)
        ways: list[Callable[[], Any]] = [lambda q=q: jax.jit(to_qtensor)(prepare(q, activations="int8"))]
        ways += (
            [lambda q=q: jax.jit(lambda q: to_qtensor(prepare(q, activations="int8")))(q)] if i <= len(NARROW) else []
        )
        for back in (way() for way in ways):
            assert jax.tree.structure(back) == jax.tree.structure(q)
            for ours, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
                assert ours.dtype == wanted.dtype
                np.testing.assert_array_equal(ours, wanted)


@each_isa
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_that_the_groups_of_a_panel_share_are_not_read(symmetric: bool) -> None:
    rows = np.random.default_rng(0).normal(size=(48, 96)).astype(np.float32)
    rows[20, 16:32] = 0  # a group whose zero point is not that of the others, in the second of three panels
    config = QuantizationConfig("int2", group_size=16, symmetric=symmetric, solver="mse")
    q, x, ids = quantize(rows, config), inputs_of(3, 96), np.arange(48)
    shared = np.ptp(np.asarray(q.zero_point), axis=1) == 0
    assert shared.tolist() == [symmetric and row != 20 for row in range(48)]
    w = prepare(q)
    poisoned = np.array(w.arrays.grids)
    poisoned[[0, 2] if symmetric else [], 1] = np.nan
    unread = dataclasses.replace(w, arrays=w.arrays._replace(grids=jnp.asarray(poisoned)))
    for activations in ("float32", "int8"):
        np.testing.assert_array_equal(qdot(x, unread, activations), qdot(x, w, activations))
        np.testing.assert_allclose(qdot(x, w, activations), qdot(x, q, activations, kernel="xla"), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(qembed(unread, ids), qembed(q, ids))


def test_panels_are_handed_to_jax_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    turn = native_panels._turn
    monkeypatch.setattr(native_panels, "_turn", lambda *args: made.append(turn(*args)) or made[-1])
    panels = prepare(weight(40, 96, 16)).arrays
    assert panels.codes.unsafe_buffer_pointer() == made[0][0].ctypes.data


# ---------------------------------------------------------------------------------------------- transformations


X = inputs_of(6, 64).reshape(2, 3, 64)


@pytest.fixture(params=["int8", "float32"])
def call(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """A product with all that may follow it, on a rotated weight in groups."""
    w = prepare(weight(40, 64, 32, rotate=True, bits=8 if request.param == "int8" else 4), activations=request.param)
    after = Epilogue(jnp.ones(40), None, None, 2 * jnp.ones(40), jnp.ones(40), "gelu", 1e-5)
    return lambda x: linear(x, w, request.param, after)


def calls_of(lowered: Any) -> int:
    return lowered.as_text().count("@aq_")


def test_programs_of_one_cpu_call_the_library(call: Callable[[Any], Any]) -> None:
    y = call(X)
    assert calls_of(jax.jit(call).lower(X)) == 2
    np.testing.assert_array_equal(jax.jit(call)(X), y)
    for mapped in (jax.vmap(call), jax.vmap(call, 1, 1), jax.vmap(jax.vmap(call))):
        assert calls_of(jax.jit(mapped).lower(X)) == 2
        np.testing.assert_array_equal(mapped(X), y)
    np.testing.assert_array_equal(jax.lax.map(call, jnp.asarray(X)), y)


def test_it_runs_without_jit_and_over_nothing(call: Callable[[Any], Any]) -> None:
    y = call(X)
    with jax.disable_jit():
        np.testing.assert_array_equal(call(jnp.asarray(X)), y)
    assert jax.vmap(call)(jnp.zeros((0, 3, 64))).shape == (0, 3, 40)
    qkv = jnp.zeros((0, 2, 5, 8))
    run = jax.vmap(lambda q: Attention().run(q, q, q, jnp.ones((2, 5), bool), 2, jnp.float32))
    assert run(qkv).shape == qkv.shape


def test_a_copy_is_the_same_tree_and_scales_may_be_traced_alone() -> None:
    q, x = weight(17, 50, 50), inputs_of(3, 50)
    w = prepare(q, activations="int8")
    for each in (w, prepare(q, kernel="xla"), prepare(q, kernel="xla", operation="rows")):
        for copied in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert jax.tree.structure(copied) == jax.tree.structure(each)
            assert hash(jax.tree.structure(copied)) == hash(jax.tree.structure(each))

    def loss(scale: Any, kernel: str | None) -> Any:
        w = dataclasses.replace(q, scale=scale)
        w = prepare(w, activations="int8") if kernel is None else w
        return qdot(x, w, "int8", kernel=kernel).sum()

    found, wanted = (jax.grad(loss)(q.scale, kernel) for kernel in (None, "xla"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), q)
    assert prepare(shapes, activations="int8").arrays == jax.eval_shape(lambda: w.arrays)


def test_numbers_of_other_dtypes_are_cast() -> None:
    q, x = weight(17, 50, 50), inputs_of(3, 50)
    w = prepare(q, activations="int8")
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, w)
    np.testing.assert_allclose(qdot(x, halved, "int8"), qdot(x, w, "int8"), rtol=0.05, atol=1)
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.bfloat16)
    found = attention(qkv, qkv, qkv, jnp.ones((2, 5), bool), 2, jnp.float32)
    assert found.shape == qkv.shape


def test_what_cannot_follow_a_product_is_refused() -> None:
    w, x = prepare(weight(17, 50, 50), activations="int8"), inputs_of(3, 50)
    for after, why in (
        (Epilogue(act="tanh"), "act='tanh'; wanted one of"),
        (Epilogue(gain=jnp.ones(17)), "a normalization wants both a gain and a shift"),
        (Epilogue(jnp.ones(1)), r"bias of shape \[1\] after a product of shape \[3, 17\]"),
    ):
        with pytest.raises(ValueError, match=why):
            linear(x, w, "int8", after)


def test_several_weights_are_mapped_over() -> None:
    several = [weight(17, 50, 50), turned(weight(17, 50, 50))]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    x = inputs_of(3, 50)
    found = jax.vmap(lambda q: qdot(x, prepare(q, activations="int8"), "int8"))(stack)
    for y, q in zip(found, several, strict=True):
        np.testing.assert_allclose(y, qdot(x, q, "int8"), rtol=1e-5, atol=1e-5)


def turned(q: QTensor) -> QTensor:
    return jax.tree.map(lambda leaf: leaf[::-1], q)


def test_derivatives_are_those_of_the_float_product() -> None:
    q, x = weight(17, 50, 50), jnp.asarray(inputs_of(3, 50))
    after = Epilogue(jnp.ones(17), jnp.ones((3, 17)), jnp.ones((3, 17)), jnp.ones(17), jnp.zeros(17), "gelu", 1e-5)

    def of(multiply: Callable[..., Any]) -> Any:
        def loss(x: Any, q: Any, after: Any) -> Any:
            return (multiply(x, q, after) * jnp.arange(17.0)).sum()

        return jax.grad(loss, (0, 1, 2), allow_int=True)(x, q, after)

    @jax.checkpoint
    def ours(x: Any, q: Any, after: Any) -> Any:
        return linear(x, prepare(q, activations="int8"), "int8", after)

    found = of(ours)
    wanted = of(lambda x, q, after: after.apply(qdot(x, q)))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if mine.dtype == jnp.float32:  # those of integers have no numbers
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)


def test_attention_maps_and_differentiates_as_xlas() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 2, 9, 8)), jnp.float32) for _ in range(3))
    mask = jnp.arange(9)[None] < jnp.array([[9], [4]])

    def of(kernel: Any) -> Callable[..., Any]:
        return jax.vmap(lambda q, k, v: kernel.run(q, k, v, mask, 2, jnp.float32))

    found, wanted = (
        jax.jit(jax.value_and_grad(lambda *qkv, k=kernel: (of(k)(*qkv) ** 2).sum(), (0, 1, 2)))(q, k, v)
        for kernel in (Attention(), xla_attention.Attention())
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_what_is_exported_or_lowered_for_others_has_no_call(call: Callable[[Any], Any]) -> None:
    y = call(X)
    (rows,) = export.symbolic_shape("rows")
    for shape, platforms in (((2, 3, 64), None), ((rows, 3, 64), None), ((2, 3, 64), ("cpu", "cuda"))):
        exported = export.export(jax.jit(call), platforms=platforms)(jax.ShapeDtypeStruct(shape, np.float32))
        assert "aq_product" not in exported.mlir_module()
        np.testing.assert_allclose(exported.call(X), y, rtol=1e-5, atol=1e-5)
    assert calls_of(jax.jit(call).trace(X).lower(lowering_platforms=("cuda",))) == 0


def test_inputs_that_are_spread_over_devices_are_xlas(call: Callable[[Any], Any]) -> None:
    mesh = jax.sharding.AbstractMesh((2,), ("data",), (AxisType.Auto,))
    x = jax.ShapeDtypeStruct((2, 3, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    assert calls_of(jax.jit(call).trace(x).lower(lowering_platforms=("cpu",))) == 0


def test_what_it_does_not_take_is_xlas_or_refused_by_name() -> None:
    crossing = quantize(np.ones((4, 24), np.float32), QuantizationConfig("int4", group_size=16))
    for q, activations, why in (
        (weight(17, 50, 50), "bfloat16", "multiplies float32 and 8-bit inputs only, found bfloat16"),
        (crossing, "float32", "wants a matrix of groups that each lie in one row"),
    ):
        assert prepare(q, activations=activations).kernel == "xla"  # type: ignore[arg-type]
        with pytest.raises(aq.ConfigError, match=f"^product: kernel 'native': {why}$"):
            prepare(q, activations=activations, kernel="native")  # type: ignore[arg-type]
    assert Attention().refuses(jnp.ones((1, 2, 4)), 2, jnp.bfloat16) == "multiplies in float32 only, found bfloat16"
