"""The grid of the least squared error: what it promises about errors, what it stores, and extreme numbers."""

from __future__ import annotations

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from aq_jax import QTensor, QuantizationConfig, QuantSpec, dequantize, quantize
from aq_jax.core.grid import round_mantissa
from aq_jax.ops import KERNELS
from aq_jax.quantizers.apply import _quantize
from aq_jax.quantizers.mse import MSE

# Few shapes and configs: each is a long compilation. All kinds of data go through the same ones.
SHAPE = (32, 128)
CASES = [(2, True), (2, False), (4, True), (4, False), (8, False)]
IDS = [f"int{bits} {'symmetric' if symmetric else 'asymmetric'}" for bits, symmetric in CASES]

# What scales and zero points of 8 significant bits may cost a group of 64: two roundings by 2^-9 for each element, of
# its group's largest value. It shows where range and levels meet exactly, and at eight bits.
STORED = 64 * (2 * 2.0**-9) ** 2 * 2


def fitted(w: np.ndarray, bits: int, symmetric: bool, group_size: int = 64) -> QTensor:
    config = QuantizationConfig(quant_type=f"int{bits}", group_size=group_size, symmetric=symmetric, solver="mse")
    q = quantize(w.astype(np.float32), config)
    assert isinstance(q, QTensor)
    return q


def squared_error(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Of each group of 64, in float64 and relative to the group's largest value."""
    v = oracle.dequantize(codes, scales, zeros, w.shape, group_size=64).astype(np.float64).reshape(-1, 64)
    w = w.astype(np.float64).reshape(-1, 64)
    return (((v - w) / np.maximum(np.abs(w).max(axis=1, keepdims=True), 1e-300)) ** 2).sum(axis=1)


def of(q: QTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return oracle.codes_of(q).ravel(), np.asarray(q.scale).ravel(), np.asarray(q.zero_point).ravel()


def data(rng: np.random.Generator) -> dict[str, np.ndarray]:
    normal = rng.normal(size=SHAPE)
    found = {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, SHAPE),
        "heavy tails": rng.standard_t(2, size=SHAPE),
        "one outlier a group": np.where(np.arange(128) % 64 == 5, 40.0, normal),
        "offset": normal + 5,
        "one-sided": np.abs(normal),
        "two values": np.sign(normal) + 0.1,
        "constant groups": np.repeat(rng.normal(size=64), 64).reshape(SHAPE),
    }
    return {kind: w.astype(np.float32) for kind, w in found.items()}


@pytest.mark.parametrize(("bits", "symmetric"), CASES, ids=IDS)
def test_never_worse_than_rounding_to_the_range(bits: int, symmetric: bool, rng: np.random.Generator) -> None:
    for kind, w in data(rng).items():
        baseline = squared_error(w, *oracle.quantize(w, bits, "absmax" if symmetric else "minmax", group_size=64))
        found = squared_error(w, *of(fitted(w, bits, symmetric)))
        exact = kind == "two values" or bits == 8
        assert found.sum() <= baseline.sum() * 1.001 + (found.size * STORED if exact else 1e-12), kind
        if not symmetric:  # each group chooses for itself
            assert (found <= baseline * 1.001 + STORED).all(), kind


@pytest.mark.parametrize(
    ("symmetric", "group_size", "most"),
    [(False, 64, 0.105), (False, 128, 0.112), (True, 64, 0.115), (True, 128, 0.118)],
    ids=["asymmetric 64", "asymmetric 128", "symmetric 64", "symmetric 128"],
)
def test_two_bits_of_a_normal_distribution(
    symmetric: bool, group_size: int, most: float, rng: np.random.Generator
) -> None:
    errors = []
    for _ in range(16):
        w = rng.normal(size=SHAPE).astype(np.float32)
        v = np.asarray(dequantize(fitted(w, 2, symmetric, group_size)), np.float64)
        errors.append(((v - w) ** 2).mean())
    mse = np.mean(errors)
    # No four levels for the whole distribution do better than 0.1175; a group's own levels can.
    assert mse <= most
    assert mse > 0.08


@pytest.mark.parametrize(("bits", "symmetric"), CASES, ids=IDS)
def test_scales_and_zero_points_have_eight_significant_bits(
    bits: int, symmetric: bool, rng: np.random.Generator
) -> None:
    for kind, w in data(rng).items():
        q = fitted(w, bits, symmetric)
        # An exact scale is worth more than a short one: constant groups keep theirs.
        constant = np.ptp(w.reshape(-1, 64), axis=1) == 0
        for values in (np.asarray(q.scale).ravel(), np.asarray(q.zero_point).ravel()):
            assert np.array_equal(round_mantissa(values, 7)[~constant], values[~constant]), kind


@pytest.mark.parametrize("bits", [2, 4])
def test_symmetric_means_one_zero_point(bits: int, rng: np.random.Generator) -> None:
    taken = set()
    kinds = data(rng) | {"only at zero and the ends": rng.choice([-1.0, 0, 1], SHAPE, p=[0.05, 0.9, 0.05])}
    for kind, w in kinds.items():
        w[3] = 0  # groups of zeros beside the others
        q = fitted(w, bits, symmetric=True)
        scale, zero = np.asarray(q.scale), np.asarray(q.zero_point)
        assert (zero[3] == 0).all()
        assert (scale[3] == 1).all()
        others = set(np.delete(zero, 3, axis=0).ravel().tolist())
        assert len(others) == 1, kind
        assert others <= {0.0, -0.5}, kind
        taken |= others
        assert not np.asarray(dequantize(q))[3].any()
    if bits == 2:
        assert taken == {0.0, -0.5}  # both are tried, and either can be the better


@pytest.mark.parametrize(("bits", "symmetric"), CASES[:2], ids=IDS[:2])
def test_powers_of_two_change_nothing_but_scales(bits: int, symmetric: bool, rng: np.random.Generator) -> None:
    w = rng.normal(size=SHAPE).astype(np.float32)
    codes, scales, zeros = of(fitted(w, bits, symmetric))
    for exponent in (-100, -17, 30, 100):
        factor = np.float32(2.0**exponent)
        more = of(fitted(w * factor, bits, symmetric))
        assert np.array_equal(more[0], codes), exponent
        assert np.array_equal(more[1], scales * factor), exponent
        assert np.array_equal(more[2], zeros), exponent


@pytest.mark.parametrize(("bits", "symmetric"), CASES, ids=IDS)
def test_extreme_ranges(bits: int, symmetric: bool, rng: np.random.Generator) -> None:
    normal = rng.normal(size=SHAPE)
    magnitudes = np.repeat(10.0 ** np.linspace(-30, 30, 64), 64).reshape(SHAPE)  # one a group
    for kind, w in {
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "a magnitude each group": normal * magnitudes,
        "all magnitudes in a group": normal * 10.0 ** rng.uniform(-30, 30, SHAPE),
        "far from zero": normal + 1e4,
        "one huge value": np.where(np.arange(128) % 64 == 0, 1e30, normal),
    }.items():
        w = w.astype(np.float32)
        q = fitted(w, bits, symmetric)
        v = np.asarray(dequantize(q))
        assert np.isfinite(v).all(), kind
        found = squared_error(w, *of(q))
        baseline = squared_error(w, *oracle.quantize(w, bits, "absmax" if symmetric else "minmax", group_size=64))
        if kind != "far from zero":
            assert found.sum() <= baseline.sum() * 1.001 + found.size * STORED, kind
        else:
            # A zero point of 8 significant bits limits how far from zero a grid can lie: what is lost is less than
            # 2^-7 of the value.
            assert (np.abs(v - w) <= 2**-7 * np.abs(w) + (np.ptp(w) if bits == 2 else 0)).all() or symmetric


def count_equations(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Of a program, and of all programs inside it."""
    return len(jaxpr.eqns) + sum(count_equations(sub) for eqn in jaxpr.eqns for sub in _inner(eqn))


def _inner(eqn: jax.extend.core.JaxprEqn) -> list[jax.extend.core.Jaxpr]:
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, jax.extend.core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, jax.extend.core.Jaxpr):
                found.append(item)
    return found


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_program_does_not_grow_with_the_matrix(symmetric: bool) -> None:
    spec, kernel = QuantSpec(2, group_size=128), KERNELS["quantize"]["xla"]

    def equations(*shape: int) -> int:
        w = jax.ShapeDtypeStruct(shape, jnp.float32)
        return count_equations(
            jax.make_jaxpr(partial(_quantize, spec=spec, symmetric=symmetric, quantizer=MSE(), kernel=kernel))(w).jaxpr
        )

    small = equations(2, 128)
    assert small > 50  # it is the solver that is counted, not a call to it
    assert equations(4096, 4096) == small
