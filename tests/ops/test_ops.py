"""Multiplying by a quantized weight, against dense float64 and against sums of integers; looking rows up in it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from jaxtyping import TypeCheckError

from aq_jax import QTensor, QuantizationConfig, QuantSpec, dequantize, qdot, qembed, quantize
from aq_jax.core import dispatch
from aq_jax.core.qtensor import scale_shape
from aq_jax.ops import MAX_PRODUCTS, attention
from aq_jax.ops.arguments import check_numbers, check_texts, check_weight
from aq_jax.ops.xla import quantize_rows

CONFIGS = [
    pytest.param(QuantizationConfig(quant_type="int8"), id="int8 channels"),
    pytest.param(QuantizationConfig(quant_type="int8", per_channel=False), id="int8 tensor"),
    pytest.param(QuantizationConfig(quant_type="int2", group_size=16, solver="absmax"), id="int2 groups by row"),
    pytest.param(QuantizationConfig(quant_type="int4", group_size=24, solver="absmax"), id="int4 groups cross rows"),
    pytest.param(QuantizationConfig(quant_type="int3", group_size=100, symmetric=False, solver="minmax"),
                 id="int3 groups of more than a row"),
]  # fmt: skip


# (numerics, the zero points of a grid): of these the grids lie in rows, so that integers can be summed.
BY_ROW = [
    pytest.param((QuantSpec(8, per_channel=True), "mid_tread"), id="int8 channels"),
    pytest.param((QuantSpec(8), "mid_tread"), id="int8 tensor"),
    pytest.param((QuantSpec(8, per_channel=True), "affine"), id="int8 channels, asymmetric"),
    pytest.param((QuantSpec(8, group_size=32), "affine"), id="int8 groups, asymmetric"),
    pytest.param((QuantSpec(4, group_size=32), "mid_tread"), id="int4 groups"),
    pytest.param((QuantSpec(4, group_size=16), "affine"), id="int4 groups, asymmetric"),
    pytest.param((QuantSpec(3, group_size=16), "mid_tread"), id="int3 groups"),
    pytest.param((QuantSpec(2, group_size=64), "mid_tread"), id="int2 groups of a row"),
    pytest.param((QuantSpec(2, group_size=16), "mid_rise"), id="int2 groups, mid-rise"),
]
Case = tuple[QuantSpec, str]


def by_hand(rng: np.random.Generator, case: Case, shape: tuple[int, int] = (6, 64)) -> QTensor:
    """Random codes on random grids, for which nothing has to be compiled."""
    spec, kind = case
    qmin, qmax = oracle.code_range(spec.bits)
    codes = rng.integers(qmin, qmax + 1, shape)
    if spec.bits < 8 and shape[1] * spec.bits % 8 == 0:
        rows = [np.frombuffer(oracle.pack(row.tolist(), spec.bits), np.uint8) for row in codes]
    else:
        rows = codes.astype(np.int8)
    grids = scale_shape(shape, spec)
    scale = rng.uniform(0.1, 1, grids) / qmax
    zero_point = {
        "mid_tread": 0 * scale,
        "mid_rise": 0 * scale - 0.5,
        "affine": rng.uniform(qmin - 3, qmax + 3, grids),
    }[kind]
    return QTensor(*(jnp.asarray(a) for a in (np.array(rows), scale.astype(np.float32), zero_point.astype(np.float32))),
                   spec, shape[1])  # fmt: skip


def dense(q: object) -> np.ndarray:
    return np.asarray(dequantize(q), np.float64)


def between_levels(rng: np.random.Generator, rows: int, inputs: int = 64) -> np.ndarray:
    """Rows of different ranges, none of whose elements is half-way between two of the row's 256 levels."""
    place = rng.integers(0, 256, (rows, inputs)) + rng.uniform(-0.3, 0.3, (rows, inputs))
    place[:, :2] = 0, 255  # the ends
    place = rng.permuted(np.clip(place, 0, 255), axis=1)
    step = np.geomspace(1e-3, 1, rows)[:, None]
    return (step * (place - rng.uniform(-20, 280, (rows, 1)))).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS)
def test_qdot_is_the_dense_product(config: QuantizationConfig, weight: np.ndarray, rng: np.random.Generator) -> None:
    q = quantize(weight, config)
    x = rng.normal(size=(2, 3, 64)).astype(np.float32)
    y = qdot(jnp.asarray(x), q, "float32")
    assert (y.shape, y.dtype) == ((2, 3, 6), jnp.float32)
    # Summed in float32: the error is relative to the sum of magnitudes, not to the result.
    bound = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(dense(q)).T)
    assert (np.abs(y - x.astype(np.float64) @ dense(q).T) <= bound).all()


def test_qdot_of_one_vector_in_half_precision_has_its_dtype(weight: np.ndarray, rng: np.random.Generator) -> None:
    q = quantize(weight, "int8")
    x = jnp.asarray(rng.normal(size=64), jnp.bfloat16)
    y = qdot(x, q, "float32")
    assert (y.shape, y.dtype) == ((6,), jnp.bfloat16)
    # Only the result is rounded: the sum is not.
    assert np.allclose(np.asarray(y, np.float64), np.asarray(x, np.float64) @ dense(q).T, rtol=2**-8, atol=0)


def test_qdot_of_integers_is_float32(weight: np.ndarray) -> None:
    q = quantize(weight, "int8")
    x = jnp.arange(64) % 5 - 2
    y = qdot(x, q)
    assert y.dtype == jnp.float32
    assert np.array_equal(y, qdot(x.astype(jnp.float32), q))
    assert np.array_equal(qdot(x.astype(jnp.uint8) % 2, q), qdot(jnp.asarray(x % 2, jnp.float32), q))


@pytest.mark.parametrize("x_shape", [(63,), (64, 1)], ids=str)
def test_qdot_refuses_other_lengths(x_shape: tuple[int, ...], weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"qdot: x of shape .* and W of shape \[6, 64\]: wanted \[\.\.\., n\]"):
        qdot(jnp.ones(x_shape), quantize(weight, "int8"))


def test_qdot_and_qembed_refuse_other_than_two_axes(weight: np.ndarray) -> None:
    q = quantize(weight.reshape(2, 3, 64), "int8")
    with pytest.raises(ValueError, match=r"W of shape \[2, 3, 64\]"):
        qdot(jnp.ones(64), q)
    with pytest.raises(ValueError, match=r"qembed: table of shape \[2, 3, 64\]: wanted \[rows, width\]"):
        qembed(q, jnp.array(0))


@pytest.mark.parametrize("how", ["int8", "float32"])
@pytest.mark.parametrize("outputs", [0, 1, 6])
def test_qdot_of_nothing(outputs: int, how: dispatch.Activations) -> None:
    nothing = quantize(np.zeros((outputs, 0), np.float32), "int8")
    assert np.array_equal(qdot(jnp.zeros((3, 0)), nothing, how), jnp.zeros((3, outputs)))
    assert qdot(jnp.zeros((2, 0, 8)), quantize(np.zeros((outputs, 8), np.float32), "int8"), how).shape == (
        2,
        0,
        outputs,
    )


@pytest.mark.parametrize("case", BY_ROW)
def test_integer_products_agree_with_the_oracle(case: Case, rng: np.random.Generator) -> None:
    q = by_hand(rng, case)
    x = between_levels(rng, 7)
    groups = 64 // (q.spec.group_size or 64)
    grids = [np.broadcast_to(np.reshape(a, (-1, groups)), (6, groups)) for a in (q.scale, q.zero_point)]
    y, magnitude = oracle.int8_dot(x, oracle.codes_of(q), *grids)
    assert (np.abs(np.asarray(qdot(jnp.asarray(x), q, "int8")) - y) <= 1e-6 * magnitude).all()
    # It is the dense product up to half a step of each row of x: 0.51 because sums are rounded too.
    step = (x.max(axis=1) - x.min(axis=1))[:, None] / 255
    assert (np.abs(y - x.astype(np.float64) @ dense(q).T) <= 0.51 * step * np.abs(dense(q)).sum(axis=1)).all()


def test_integer_products_of_codes_that_fill_no_bytes(rng: np.random.Generator) -> None:
    q = by_hand(rng, (QuantSpec(3, group_size=20), "affine"), (4, 60))
    assert not q.packed
    assert q.by_row
    x = between_levels(rng, 3, 60)
    y, magnitude = oracle.int8_dot(x, oracle.codes_of(q), np.asarray(q.scale), np.asarray(q.zero_point))
    assert (np.abs(np.asarray(qdot(jnp.asarray(x), q, "int8")) - y) <= 1e-6 * magnitude).all()


def test_rows_are_quantized_as_in_the_oracle(rng: np.random.Generator) -> None:
    x = between_levels(rng, 7)
    codes, scale, offset = quantize_rows(jnp.asarray(x))
    for row, *found in zip(x, np.asarray(codes), np.asarray(scale)[:, 0], np.asarray(offset)[:, 0], strict=True):
        wanted = oracle.row_codes(row)
        assert np.array_equal(found[0], wanted[0])
        assert (wanted[0].min(), wanted[0].max()) == (-128, 127)
        assert found[1] == wanted[1]
        assert np.isclose(found[2], wanted[2], rtol=1e-6, atol=1e-6 * 128 * wanted[1])  # perhaps one operation


@pytest.mark.parametrize(
    ("rows", "inputs"), [(1, 1536), (7, 1536), (8, 1536), (9, 1536), (33, 1536), (2, MAX_PRODUCTS)]
)
def test_sums_of_extreme_codes_are_exact(rows: int, inputs: int, rng: np.random.Generator) -> None:
    codes = rng.choice(np.array([-128, -127, 126, 127], np.int8), (5, inputs))
    codes[0], codes[1] = -128, 127
    q = QTensor(jnp.asarray(codes), jnp.ones((5, 1)), jnp.zeros((5, 1)), QuantSpec(8, per_channel=True), inputs)
    # Rows whose scale is 1 and whose offset is 0: they are codes themselves.
    x = rng.choice(np.array([-128, -127, 126, 127], np.float32), (rows, inputs))
    x[0, 1:], x[-1, 1:], x[:, 0] = -128, 127, 127
    x[:, 1] = -128
    y = np.asarray(qdot(jnp.asarray(x), q, "int8"))
    wanted = x.astype(np.int64) @ codes.astype(np.int64).T
    assert 2**24 < np.abs(wanted).max() < 2**31  # float32 could not have counted so far
    assert np.array_equal(y, wanted.astype(np.float32))


def test_bfloat16_products_round_both_sides(weight: np.ndarray, rng: np.random.Generator) -> None:
    q = quantize(weight, "int8")
    x = rng.normal(size=(9, 64)).astype(np.float32)
    a, b = (v.astype(jnp.bfloat16).astype(np.float64) for v in (x, np.asarray(dequantize(q))))
    y = np.asarray(qdot(jnp.asarray(x), q, "bfloat16"))
    assert (np.abs(y - a @ b.T) <= 1e-6 * np.abs(a) @ np.abs(b).T).all()
    assert not np.allclose(y, x @ dense(q).T, rtol=1e-4)


def relative(y: object, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted))


def test_the_error_of_each_formulation(rng: np.random.Generator) -> None:
    q = quantize(rng.normal(size=(48, 384)).astype(np.float32), "int8")
    x = rng.normal(size=(64, 384)).astype(np.float32)
    wanted = x.astype(np.float64) @ dense(q).T
    assert relative(qdot(jnp.asarray(x), q, "float32"), wanted) < 1e-6
    assert 1e-4 < relative(qdot(jnp.asarray(x), q, "bfloat16"), wanted) < 5e-3
    assert 1e-3 < relative(qdot(jnp.asarray(x), q, "int8"), wanted) < 1.5e-2
    # Rows have scales of their own: small ones beside large ones are as good.
    sizes = np.geomspace(1e-6, 1e6, 64).astype(np.float32)[:, None]
    y = np.asarray(qdot(jnp.asarray(x * sizes), q, "int8")) / sizes
    assert max(relative(row, row_wanted) for row, row_wanted in zip(y, wanted, strict=True)) < 2e-2


@pytest.mark.parametrize("how", dispatch.ACTIVATIONS)
@pytest.mark.parametrize("bad", [1e30, 0.0, np.nan, np.inf, -np.inf], ids=str)
def test_a_row_does_not_depend_on_the_others(how: dispatch.Activations, bad: float, rng: np.random.Generator) -> None:
    x = rng.normal(size=(9, 64)).astype(np.float32)
    others = x.copy()
    others[[0, 2, 8]] *= 100
    others[5, 3] = bad
    alone = [1, 3, 4, 6, 7]
    for case in ((QuantSpec(8, per_channel=True), "mid_tread"), (QuantSpec(4, group_size=32), "affine")):
        q = by_hand(rng, case)
        y, beside = (np.asarray(qdot(jnp.asarray(v), q, how)) for v in (x, others))
        assert np.array_equal(y[alone], beside[alone])
        assert np.isfinite(np.delete(beside, 5, axis=0)).all()
        assert np.isfinite(beside[5]).all() if np.isfinite(bad) else not np.isfinite(beside[5]).any()


@pytest.mark.parametrize("case", BY_ROW)
def test_constant_rows_and_rows_of_any_size(case: Case, rng: np.random.Generator) -> None:
    q = by_hand(rng, case)
    shape = np.linspace(-1, 1, 64)
    rows = [0 * shape, 0 * shape + 3.7, 0 * shape - 1e-20, 0 * shape + 1e30, *(shape * 10.0**e for e in (-38, -20, 20))]
    x = np.array(rows, np.float32)
    wanted = x.astype(np.float64) @ dense(q).T
    y = np.asarray(qdot(jnp.asarray(x), q, "int8"), np.float64)
    step = np.maximum(np.ptp(x, axis=1) / 255, 2.0**-100)[:, None]
    # Zero points far from the codes cost digits.
    digits = 1e-6 * np.abs(x).max(axis=1)[:, None] + 1e-4 * step
    bound = 0.51 * step + digits * (1 + np.abs(np.asarray(q.zero_point)).max() / 2 ** (q.spec.bits - 1))
    assert (np.abs(y - wanted) <= bound * np.abs(dense(q)).sum(axis=1)).all()


def test_rows_close_to_the_largest_float(weight: np.ndarray) -> None:
    # 1.6e38 in steps of 1.25e36, whose product with a sum of codes is over 3.4e38; that with small weights is not.
    q = quantize(weight * np.float32(1e-3), "int8")
    x = np.linspace(-1.6e38, 1.6e38, 64).astype(np.float32)
    y = np.asarray(qdot(jnp.asarray(x), q, "int8"), np.float64)
    wanted = x.astype(np.float64) @ dense(q).T
    assert np.abs(wanted).max() < 1e38
    assert relative(y / 1e38, wanted / 1e38) < 2e-2
    # A range that is no float32 gives no numbers, rather than wrong ones.
    assert not np.isfinite(qdot(2 * jnp.asarray(x), q, "int8")).any()


@pytest.mark.parametrize("how", dispatch.ACTIVATIONS)
def test_derivatives_are_those_of_the_float_product(how: dispatch.Activations, rng: np.random.Generator) -> None:
    q = by_hand(rng, (QuantSpec(4, group_size=16), "affine"))
    x, dx = (jnp.asarray(rng.normal(size=(9, 64)), jnp.float32) for _ in range(2))
    dy = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)

    def exact(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.dot(x, dequantize(dataclasses.replace(q, scale=scale)).T)

    def rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
        return qdot(x, dataclasses.replace(q, scale=scale), how)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        y, dy_of_dx = jax.jvp(f, (x, q.scale), (dx, 0.1 * q.scale))
        return dy_of_dx, *jax.vjp(f, x, q.scale)[1](dy), y

    (*found, y), (*wanted, _) = derivatives(rounded), derivatives(exact)
    assert np.allclose(y, qdot(x, q, how), rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert np.isfinite(a).all()
        assert np.allclose(a, b, rtol=1e-4, atol=1e-4)
    half = jax.ShapeDtypeStruct((9, 64), jnp.bfloat16)
    assert jax.eval_shape(jax.grad(lambda x: qdot(x, q, how).sum()), half).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("case", "how"),
    [
        ((QuantSpec(8, per_channel=True), "mid_tread"), "float32"),
        ((QuantSpec(8, per_channel=True), "mid_tread"), "bfloat16"),
        ((QuantSpec(4, group_size=32), "affine"), "int8"),
    ],
    ids=dispatch.ACTIVATIONS,
)
def test_qdot_under_jit_vmap_and_scan(case: Case, how: dispatch.Activations, rng: np.random.Generator) -> None:
    layers = [by_hand(rng, case, (64, 64)) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jnp.asarray(between_levels(rng, 9))
    dot = functools.partial(qdot, activations=how)
    close = functools.partial(np.allclose, rtol=1e-4, atol=1e-3)
    y = [dot(x, layer) for layer in layers]
    assert close(jax.jit(dot)(x, layers[0]), y[0])
    assert close(jax.vmap(dot, in_axes=(0, None))(x, layers[0]), y[0])
    assert close(jax.vmap(dot, in_axes=(None, 0))(x, stacked), jnp.stack(y))
    assert close(jax.vmap(dot)(jnp.stack([x, 2 * x, -x]), stacked), jnp.stack([y[0], 2 * y[1], -y[2]]))
    with pytest.raises(ValueError, match=r"W of shape \[3, 64, 64\]"):
        dot(x, stacked)

    @jax.jit
    def run(x: jax.Array, stacked: QTensor) -> jax.Array:
        return lax.scan(lambda x, layer: (dot(x, layer), None), x, stacked)[0]

    # Half-way between two levels, a sum in another order may be rounded to another one.
    assert relative(run(x, stacked), np.asarray(functools.reduce(dot, layers, x), np.float64)) < 1e-3


def test_qdot_refuses_unknown_activations_and_grids_that_cross_rows(weight: np.ndarray) -> None:
    x = jnp.ones(64)
    unchecked = inspect.unwrap(qdot)  # the tests would refuse the type
    with pytest.raises(ValueError, match=r"(?m)^qdot: activations='int4'; wanted one of float32, bfloat16, int8$"):
        unchecked(x, quantize(weight, "int8"), "int4")
    crossing = quantize(weight, QuantizationConfig("int8", group_size=24))
    with pytest.raises(ValueError, match=r"(?m)^qdot: integer products need grids that each lie in one row of W; found "
                                         r"QTensor\(int8\[6, 64\], QuantSpec"):  # fmt: skip
        qdot(x, crossing, "int8")
    assert np.allclose(qdot(x, crossing), dense(crossing).sum(axis=1), rtol=1e-5, atol=1e-5)
    assert qdot(x, crossing, "bfloat16").shape == (6,)


def test_sums_that_32_bits_may_not_hold_are_not_taken() -> None:
    shapes = jax.eval_shape(lambda w: quantize(w, "int8"), jax.ShapeDtypeStruct((1, MAX_PRODUCTS + 1), jnp.float32))
    assert 2**14 * MAX_PRODUCTS < 2**31 <= 2**14 * (MAX_PRODUCTS + 1)
    x = jax.ShapeDtypeStruct((9, MAX_PRODUCTS + 1), jnp.float32)
    with pytest.raises(ValueError, match="integer products need at most 131071 products in a sum, for 32 bits to hold"):
        jax.eval_shape(lambda x, q: qdot(x, q, "int8"), x, shapes)
    assert jax.eval_shape(qdot, x, shapes).shape == (9, 1)
    grouped = QuantizationConfig("int8", group_size=2**16)
    shapes = jax.eval_shape(lambda w: quantize(w, grouped), jax.ShapeDtypeStruct((1, 2**17), jnp.float32))
    assert jax.eval_shape(lambda x, q: qdot(x, q, "int8"), x, shapes).shape == (9, 1)


def test_the_program_does_not_grow_with_the_groups() -> None:
    def equations(groups: int, how: str) -> int:
        config = QuantizationConfig("int4", group_size=64, solver="absmax")
        q = jax.eval_shape(lambda w: quantize(w, config), jax.ShapeDtypeStruct((4, groups * 64), jnp.float32))
        x = jax.ShapeDtypeStruct((9, groups * 64), jnp.float32)
        return str(jax.make_jaxpr(functools.partial(qdot, activations=how))(x, q)).count(" = ")

    for how in dispatch.ACTIVATIONS:
        few = equations(2, how)
        assert few > 10  # it is the product that is counted, not a call to it
        assert equations(16, how) == few


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 1), ("gpu", 9), ("tpu", 1), ("METAL", 9)])
def test_numerics_do_not_depend_on_the_machine(
    platform: str, rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert {dispatch.backend()} <= set(dispatch.TOKENS) == set(dispatch.FEW_TOKENS) == set(dispatch.COMPILER_OPTIONS)
    jax.clear_caches()  # what was traced for another machine
    q = by_hand(rng, (QuantSpec(8, per_channel=True), "mid_tread"), (7, 40))
    x = jnp.asarray(rng.normal(size=(rows, 40)), jnp.float32)
    assert [how for how in dispatch.ACTIVATIONS if np.array_equal(qdot(x, q, how), qdot(x, q))] == ["float32"]
    products = [jnp.dtype(dispatch.product_dtype(how)).name for how in dispatch.ACTIVATIONS]
    assert products == ["float32", "bfloat16", "float32"]


# Every kind of id in one list: ends, negative ones, and ones outside the table on both sides.
IDS = [0, 5, 2, -1, -6, 6, 7, 100, -7, -9, -100]
INSIDE = [-6 <= i < 6 for i in IDS]


@pytest.mark.parametrize("config", CONFIGS)
def test_qembed_takes_rows(config: QuantizationConfig, weight: np.ndarray) -> None:
    q = quantize(weight, config)
    rows = np.asarray(qembed(q, jnp.array(IDS)))
    assert (rows.shape, rows.dtype) == ((len(IDS), 64), np.float32)
    values = np.asarray(dequantize(q))
    for i, inside, row in zip(IDS, INSIDE, rows, strict=True):
        assert np.array_equal(row, values[i]) if inside else np.isnan(row).all(), i


@pytest.mark.parametrize("config", CONFIGS[:2])
@pytest.mark.parametrize("shape", [(), (2, 2), (1, 3, 2)], ids=str)
def test_qembed_of_any_batch(config: QuantizationConfig, shape: tuple[int, ...], weight: np.ndarray) -> None:
    q = quantize(weight, config)
    ids = np.array([3, 9, -2, 0, -8, 5])[: int(np.prod(shape))].reshape(shape)
    rows = np.asarray(qembed(q, jnp.asarray(ids)))
    assert rows.shape == (*shape, 64)
    values = np.asarray(dequantize(q))
    for at in np.ndindex(*shape):
        inside = -6 <= ids[at] < 6
        assert np.array_equal(rows[at], values[ids[at]]) if inside else np.isnan(rows[at]).all(), at


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
def test_qembed_of_nothing_and_from_nothing(rows: int, shape: tuple[int, ...]) -> None:
    q = quantize(jnp.ones((rows, 8)), "int8")
    found = qembed(q, jnp.full(shape, rows, jnp.int32))
    assert found.shape == (*shape, 8)
    assert jnp.isnan(found).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_qembed_takes_ids_of_any_integer_dtype(dtype: str, rng: np.random.Generator) -> None:
    # More rows than the smallest dtypes can count.
    table = quantize(rng.normal(size=(300, 8)).astype(np.float32), "int8")
    signed = dtype.startswith("int")
    ids = np.array([0, 7, 100, -1 if signed else 255], dtype)
    assert np.array_equal(qembed(table, jnp.asarray(ids)), dequantize(table)[ids.astype(int)])


@pytest.mark.parametrize("bad", [2**32 + 1, 2**32 - 1, -(2**40), np.uint64(2**63 + 1)])
def test_qembed_of_ids_that_32_bits_do_not_hold(bad: int, weight: np.ndarray) -> None:
    """NumPy has them; JAX would keep their lower halves."""
    q = quantize(weight, "int8")
    found = np.asarray(qembed(q, np.array([bad])))
    assert np.isnan(found).all()
    assert np.array_equal(qembed(q, np.array([1, -1])), dequantize(q)[np.array([1, -1])])


def test_what_is_no_array_is_refused_by_what_it_is(weight: np.ndarray) -> None:
    q = quantize(weight, "int8")
    for bad, found in (([1.0], "a list"), (q, "a QTensor"), (jnp.ones(2, jnp.complex64), "an array of complex64")):
        with pytest.raises(TypeError, match=f"qdot: x is {found}; wanted an array of real numbers"):
            check_numbers("qdot: x", bad)
    for bad, found in ((jnp.ones(2), "an array of float32"), (np.array([True]), "an array of bool")):
        with pytest.raises(TypeError, match=f"ids is {found}; wanted an array of integers"):
            check_numbers("ids", bad, whole=True)
    with pytest.raises(TypeError, match="W is an array of float32; wanted a QTensor"):
        check_weight("W", weight)


@pytest.mark.parametrize(
    ("mask", "heads", "error", "found"),
    [
        (np.ones((2, 5), np.int32), 2, TypeError, "mask is an array of int32; wanted an array of bool"),
        ([[True] * 5] * 2, 2, TypeError, "mask is a list"),
        (np.ones((2, 6), bool), 2, ValueError, r"mask has shape \(2, 6\); wanted \[batch, tokens\], here \(2, 5\)"),
        (np.ones((2, 5), bool), 4, ValueError, "a width of 6 in 4 heads"),
        (np.ones((2, 5), bool), 0, ValueError, "a width of 6 in 0 heads"),
    ],
)
def test_attention_says_what_it_wants(mask: object, heads: int, error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=found):
        check_texts("attention", (2, 5, 6), mask, heads)
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        with pytest.raises((error, TypeCheckError)):
            attention(*[jnp.ones((2, 5, 6))] * 3, jnp.asarray(mask), heads, jnp.float32)


def test_qembed_under_jit_and_vmap(weight: np.ndarray) -> None:
    q = quantize(weight, QuantizationConfig(quant_type="int4", group_size=24, solver="absmax"))
    ids = jnp.array([[1, 2], [5, -3]])
    assert np.array_equal(jax.jit(qembed)(q, ids), qembed(q, ids))
    assert np.array_equal(jax.vmap(qembed, in_axes=(None, 0))(q, ids), qembed(q, ids))
