"""Laws of grids, and that NumPy and XLA agree on them in every bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_jax.codes import Affine, Grid
from aq_jax.codes.affine import code_range
from aq_jax.core.grid import (
    SCALE_MAX,
    SCALE_MIN,
    absmax_grid,
    finite_range,
    fix_degenerate,
    minmax_grid,
    round_mantissa,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

decode = Affine(8).decode  # whatever the width
GRIDS = {"absmax": absmax_grid, "minmax": minmax_grid}


@pytest.fixture(autouse=True)
def _overflow_is_handled() -> Iterator[None]:
    """NumPy warns where XLA is silent; whoever computes grids by NumPy turns that off."""
    with np.errstate(over="ignore"):
        yield


def rise_grid(lo: np.ndarray, hi: np.ndarray, code: Affine) -> Grid:
    """Mid-rise over the full range: the widest level is half a step inside it."""
    scale = np.maximum(hi, -lo) / np.float32(code.max_level + 1)
    return fix_degenerate(scale, np.zeros_like(scale), np.zeros_like(scale), lo, hi, code, "mid_rise")


def samples(rng: np.random.Generator) -> np.ndarray:
    """Groups of eight: plain ones of every magnitude, offset ones, constants, zeros, one-sided ones, ties."""
    plain = rng.normal(size=(200, 8)) * np.geomspace(1e-30, 1e30, 200)[:, None]
    offset = rng.normal(size=(50, 8)) + np.geomspace(1, 1e4, 50)[:, None]
    special = np.array(
        [
            *([c] * 8 for c in (0.0, 3.7, -3.7, -0.0, 1e-30, -1e30)),
            [0, 0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, -1],
            [1, 2, 3, 4, 5, 6, 7, 8],
            [-127, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 127],
        ]
    )
    return np.concatenate([plain, offset, special]).astype(np.float32)


def min_max(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return w.min(axis=-1), w.max(axis=-1)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["absmax", "minmax"])
def test_numpy_and_jax_agree_in_every_bit(kind: str, bits: int, rng: np.random.Generator) -> None:
    w = samples(rng)

    # Compiled as a whole: only then can XLA fuse a multiplication with an addition.
    @jax.jit
    def both(w: jax.Array) -> tuple[jax.Array, ...]:
        lo, hi, _ = finite_range(w)
        grid = GRIDS[kind](lo, hi, Affine(bits))
        codes = Affine(bits).encode(w, grid)
        return *grid[:4], codes, decode(codes, grid.scale, grid.zero_point)

    grid = GRIDS[kind](*min_max(w), Affine(bits))
    codes = Affine(bits).encode(w, grid)
    values = decode(codes, grid.scale, grid.zero_point)
    names = ("scale", "zero_point", "base", "sound", "codes", "values")
    for name, ours, theirs in zip(names, both(w), (*grid[:4], codes, values), strict=True):
        assert isinstance(theirs, np.ndarray), name
        assert ours.dtype == theirs.dtype, name
        assert np.array_equal(np.asarray(ours), theirs), name


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["absmax", "minmax", "mid_rise"])
def test_the_error_is_at_most_half_a_step(kind: str, bits: int, rng: np.random.Generator) -> None:
    w = samples(rng)
    grid = (GRIDS | {"mid_rise": rise_grid})[kind](*min_max(w), Affine(bits))
    codes = Affine(bits).encode(w, grid)
    qmin, qmax = code_range(bits)
    assert np.array_equal(codes, np.round(codes))
    assert codes.min() >= qmin
    assert codes.max() <= qmax
    values = decode(codes, grid.scale, grid.zero_point).astype(np.float64)
    largest = np.abs(w).max(axis=-1, keepdims=True)
    # A float zero point carries the rounding of its own size, which grows with the offset: up to n steps of the range.
    slack = 2 * np.spacing(np.maximum(largest, np.abs(grid.zero_point * grid.scale)[:, None]))
    bound = grid.scale[:, None].astype(np.float64) / 2 + slack
    assert (np.abs(values - w) <= bound).all()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["absmax", "minmax", "mid_rise"])
def test_encoding_a_dequantized_tensor_gives_the_same_codes(kind: str, bits: int, rng: np.random.Generator) -> None:
    w = samples(rng)
    # A group whose offset is thousands of times its range has no digits left to be encoded again.
    w = w[(np.abs(w).max(axis=-1) < 1000 * np.ptp(w, axis=-1)) | (np.ptp(w, axis=-1) == 0)]
    grid = (GRIDS | {"mid_rise": rise_grid})[kind](*min_max(w), Affine(bits))
    codes = Affine(bits).encode(w, grid)
    again = Affine(bits).encode(decode(codes, grid.scale, grid.zero_point), grid)
    assert np.array_equal(again, codes)


@pytest.mark.parametrize("kind", ["absmax", "minmax", "mid_rise"])
@pytest.mark.parametrize("c", [1.0, -1.0, 3.7, -3.7, 1e-37, 1e36, -1e36, 0.0])
@pytest.mark.parametrize("bits", [8, 2])
def test_a_constant_group_is_exact(kind: str, c: float, bits: int) -> None:
    w = np.full((1, 8), c, np.float32)
    grid = (GRIDS | {"mid_rise": rise_grid})[kind](*min_max(w), Affine(bits))
    codes = Affine(bits).encode(w, grid)
    assert grid.sound.all()
    assert np.array_equal(decode(codes, grid.scale, grid.zero_point), w)
    if c == 0:
        assert (grid.scale[0], grid.zero_point[0], codes[0, 0]) == (1, 0, 0)
    elif kind == "mid_rise":
        # The level nearest to a positive c is 0.5 * (2 c): code 0; of a negative one, code -1.
        assert (grid.scale[0], grid.zero_point[0], codes[0, 0]) == (2 * abs(w[0, 0]), -0.5, min(np.sign(c), 0))
    else:
        assert (grid.scale[0], grid.zero_point[0], codes[0, 0]) == (abs(w[0, 0]), 0, np.sign(c))


def test_two_bit_mid_rise_has_four_levels_around_zero() -> None:
    grid = Grid(*np.array([[2.0], [-0.5], [0.0]], np.float32), np.array([True]), "mid_rise")
    codes = Affine(2).encode(np.array([[-9, -2, -0.1, 0.1, 1.9, 2, 9]], np.float32), grid)
    assert codes.tolist() == [[-2, -1, -1, 0, 0, 1, 1]]
    assert decode(codes, grid.scale, grid.zero_point).tolist() == [[-3, -1, -1, 1, 1, 3, 3]]


@pytest.mark.parametrize("kind", ["absmax", "minmax"])
@pytest.mark.parametrize(
    "w",
    [[3e38, -3e38], [3e38, 0.0], [1.2e-38, -1.2e-38], [2.0**-126, 0.0]],
    ids=["too large", "too large, one sign", "too small", "too small, one sign"],
)
def test_a_scale_out_of_bounds_is_not_sound(kind: str, w: list[float]) -> None:
    values = np.array([w], np.float32)
    bits = 2 if values.max() > 1 else 8
    grid = GRIDS[kind](*min_max(values), Affine(bits))
    assert not grid.sound.any()
    assert SCALE_MIN <= grid.scale[0] <= SCALE_MAX


@pytest.mark.parametrize(
    "w",
    [[-3e38, 1e38, 3e38], [1e37, 1e37, 1e37], [-1e37, -1e37, -1e37]],
    ids=["a range beyond float32", "a constant, 128 times which is beyond", "a negative one"],
)
def test_an_asymmetric_grid_whose_arithmetic_overflows_is_not_sound(w: list[float]) -> None:
    # Their scales are within bounds, but x - base would be infinite, and the code of 1e38 that of 3e38.
    values = np.array([w], np.float32)
    assert not minmax_grid(*min_max(values), Affine(8)).sound.any()
    assert not jax.jit(lambda x: minmax_grid(*finite_range(x)[:2], Affine(8)).sound)(values).any()
    if w[0] == w[1]:
        assert absmax_grid(*min_max(values), Affine(8)).sound.all()


def test_nan_has_the_code_zero_and_infinities_saturate() -> None:
    eight = Affine(8)

    @jax.jit
    def found(w: jax.Array) -> tuple[jax.Array, ...]:
        lo, hi, finite = finite_range(w)
        return lo, hi, finite, *(eight.encode(w, grid(lo, hi, eight)) for grid in (absmax_grid, minmax_grid))

    lo, hi, finite, symmetric, asymmetric = found(np.array([[1.0, -1.0, np.nan, np.inf, -np.inf, 0.25]], np.float32))
    assert (lo.tolist(), hi.tolist(), bool(finite)) == ([-1.0], [1.0], False)
    assert symmetric.tolist() == [[127, -127, 0, 127, -128, 32]]
    assert asymmetric.tolist() == [[127, -128, 0, 127, -128, 31]]


def test_a_group_without_a_finite_element_has_the_range_zero() -> None:
    lo, hi, finite = finite_range(jnp.array([[jnp.nan, jnp.inf], [2.0, 3.0]]))
    assert (lo.tolist(), hi.tolist(), bool(finite)) == ([0.0, 2.0], [0.0, 3.0], False)


normal_floats = st.floats(width=32, allow_nan=False, allow_subnormal=False)


@given(st.lists(normal_floats, min_size=16, max_size=16), st.sampled_from([7, 0, 15]))
def test_round_mantissa_is_the_same_in_numpy_and_jax(values: list[float], bits: int) -> None:
    x = np.array(values, np.float32)
    ours, theirs = round_mantissa(x, bits), np.asarray(round_mantissa(jnp.asarray(x), bits))
    assert isinstance(ours, np.ndarray)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_round_mantissa_rounds_ties_to_even() -> None:
    step = 2.0**-7
    x = np.array([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - 1.5 * step, 1.99999, 0.0], np.float32)
    wanted = [1, 1 + 2 * step, 1 + step, -1 - 2 * step, 2.0, 0.0]
    assert round_mantissa(x, 7).tolist() == wanted
    assert round_mantissa(jnp.asarray(x), 7).tolist() == wanted
    # No mantissa bit: a power of two, at most twice or half the number.
    assert round_mantissa(np.array([1.0, 1.4, 1.6, 5.0], np.float32), 0).tolist() == [1, 1, 2, 4]
