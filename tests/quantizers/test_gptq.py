"""GPTQ against its laws: what it minimizes, what it must not depend on, and a plain NumPy column by column."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import moment

from aq_jax import ConfigError, QTensor, QuantSpec, dequantize, quantize
from aq_jax.codes.affine import code_range
from aq_jax.codes.bits_jax import unpack_float
from aq_jax.config import QuantizationConfig
from aq_jax.quantizers.gptq import TILE_ROWS, gptq, gptq_tiled
from aq_jax.quantizers.hessian import prepare_hessian

ROW, WIDTH = 24, 96
CASES = [  # with whether it is symmetric
    (QuantSpec(2, group_size=32), False),
    (QuantSpec(2, group_size=32), True),
    (QuantSpec(3, per_channel=True), False),
    (QuantSpec(4, group_size=48, rotation=32), False),
    (QuantSpec(8, per_channel=True), True),
]
SLOW = (1, 2)  # compiled once for each: those left have zero points, rotation, channels and symmetry among them
IDS = [f"{s.quant_type}-{s.group_size or 'channel'}-{'sym' if symmetric else 'asym'}" for s, symmetric in CASES]

EACH = [
    pytest.param(*case, id=name, marks=pytest.mark.slow if i in SLOW else ())
    for i, (case, name) in enumerate(zip(CASES, IDS, strict=True))
]


def weights(rows: int = ROW, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def codes_of(q: QTensor) -> np.ndarray:
    return np.asarray(unpack_float(q.codes, q.spec.bits) if q.packed else q.codes, np.float32)


def output_error(q: QTensor, w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Of each row: the expected square of what its output changes by."""
    change = np.asarray(dequantize(q), np.float64) - w
    return np.einsum("ri,ij,rj->r", change, h.astype(np.float64), change)


def wide(grid: np.ndarray, width: int) -> np.ndarray:
    return np.repeat(np.asarray(grid), width // grid.shape[1], axis=1)


@pytest.mark.parametrize(("spec", "symmetric"), EACH)
def test_under_equal_inputs_it_is_round_to_nearest_on_its_grid(spec: QuantSpec, symmetric: bool) -> None:
    w = weights()
    for rounds in (0, 4):
        q = gptq(w, prepare_hessian(jnp.eye(WIDTH), rotation=spec.rotation), spec, symmetric, rounds=rounds)
        turned = np.asarray(w if not spec.rotation else dequantize(quantize_exactly(w, spec)), np.float32)
        scale, zero = wide(q.scale, WIDTH), wide(q.zero_point, WIDTH)
        nearest = np.clip(np.round(turned / scale + zero), *code_range(spec.bits))
        assert (codes_of(q) != nearest).mean() < 0.002  # ties


def quantize_exactly(w: np.ndarray, spec: QuantSpec) -> QTensor:
    """The rotated weights as a QTensor that is not rotated: codes are floats, the grid is 1."""
    from aq_jax.codes.rotation_jax import rotate

    ones = jnp.ones((len(w), 1))
    return QTensor(rotate(jnp.asarray(w), spec.rotation), ones, ones - 1, QuantSpec(8, per_channel=True), w.shape[1])


@pytest.mark.parametrize(("spec", "symmetric"), EACH)
def test_outputs_change_less_than_by_mse_and_refining_never_hurts(spec: QuantSpec, symmetric: bool) -> None:
    w, h = weights(), moment(WIDTH)
    under = prepare_hessian(h, 1e-4, spec.rotation)
    searched = quantize(
        w,
        QuantizationConfig(
            f"int{spec.bits}", spec.per_channel or None, spec.group_size, symmetric, "mse", bool(spec.rotation)
        ),
    )
    assert isinstance(searched, QTensor)
    errors = [output_error(gptq(w, under, spec, symmetric, rounds=rounds), w, h) for rounds in (0, 1, 4)]
    assert errors[0].sum() < 0.8 * output_error(searched, w, h).sum()
    # In the damped metric each row gets better or stays; without the damping nearly so.
    assert (errors[1] <= 1.01 * errors[0]).all()
    assert (errors[2] <= 1.01 * errors[1]).all()
    assert errors[2].sum() < errors[0].sum()
    other = output_error(gptq(w, under, spec, symmetric), w, np.eye(WIDTH))
    assert other.sum() > output_error(searched, w, np.eye(WIDTH)).sum()


def test_columns_make_up_for_those_before_as_in_numpy() -> None:
    spec = QuantSpec(3, per_channel=True)
    w, h = weights(6, 40), moment(40)
    under = prepare_hessian(h, 0.01)
    q = gptq(w, under, spec, symmetric=False, rounds=0)
    # H^-1 taken apart in float64, in the order of the largest inputs.
    damped = np.asarray(under.h, np.float64)
    order = np.argsort(-np.diagonal(damped), kind="stable")
    inverse = np.linalg.inv(damped[order][:, order])
    left, codes = w.astype(np.float64)[:, order], np.zeros_like(w)
    scale, zero = np.asarray(q.scale)[:, 0], np.asarray(q.zero_point)[:, 0]
    for j in range(40):
        codes[:, order[j]] = np.clip(np.round(left[:, j] / scale + zero), *code_range(3))
        error = left[:, j] - (codes[:, order[j]] - zero) * scale
        left -= np.outer(error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # that column is done: leave it out
    assert (codes != codes_of(q)).mean() < 0.02  # ties, and what they lead to


@pytest.mark.parametrize(("spec", "symmetric"), CASES[:2], ids=IDS[:2])
def test_rows_do_not_depend_on_their_order(spec: QuantSpec, symmetric: bool) -> None:
    w, under, order = weights(), prepare_hessian(moment(WIDTH)), np.random.default_rng(2).permutation(ROW)
    first, second = gptq(w, under, spec, symmetric), gptq(w[order], under, spec, symmetric)
    np.testing.assert_array_equal(np.asarray(first.codes)[order], second.codes)
    np.testing.assert_array_equal(np.asarray(first.scale)[order], second.scale)


def test_layers_of_one_shape_are_solved_under_vmap() -> None:
    w, h = np.stack([weights(seed=3), weights(seed=4)]), np.stack([moment(WIDTH), moment(WIDTH, seed=5)])
    both = jax.vmap(lambda w, h: gptq(w, prepare_hessian(h), *CASES[0]))(w, h)
    for i in range(2):
        alone = gptq(w[i], prepare_hessian(h[i]), *CASES[0])
        assert (np.asarray(both.codes[i]) != np.asarray(alone.codes)).mean() < 0.02
        one = output_error(jax.tree.map(lambda leaf, i=i: leaf[i], both), w[i], h[i]).sum()
        np.testing.assert_allclose(one, output_error(alone, w[i], h[i]).sum(), rtol=0.02)


def test_the_program_does_not_grow_with_the_matrix() -> None:
    def equations(width: int) -> int:
        spec = QuantSpec(2, group_size=128)
        shapes = jax.ShapeDtypeStruct((8, width), jnp.float32), jax.ShapeDtypeStruct((width, width), jnp.float32)
        return str(jax.make_jaxpr(lambda w, h: gptq(w, prepare_hessian(h), spec, symmetric=False))(*shapes)).count("=")

    assert equations(256) == equations(1024)


def test_tiles_give_what_one_piece_gives() -> None:
    w, under = weights(TILE_ROWS + 40), prepare_hessian(moment(WIDTH))
    tiled, whole = gptq_tiled(w, under, *CASES[1]), gptq(w, under, *CASES[1])
    assert tiled.shape == whole.shape
    assert isinstance(tiled.codes, np.ndarray)
    assert len(np.unique(tiled.zero_point)) == 1
    np.testing.assert_allclose(output_error(tiled, w, moment(WIDTH)), output_error(whole, w, moment(WIDTH)), rtol=0.05)


def test_weights_of_dead_inputs_are_rounded_to_the_nearest() -> None:
    w, h = weights(), moment(WIDTH)
    w[:, :32] = 0.7  # constant groups are no exception
    h[40:44], h[:, 40:44] = 0, 0
    q = gptq(w, prepare_hessian(h), *CASES[0])
    dead = slice(40, 44)
    scale, zero = wide(q.scale, WIDTH)[:, dead], wide(q.zero_point, WIDTH)[:, dead]
    np.testing.assert_array_equal(codes_of(q)[:, dead], np.clip(np.round(w[:, dead] / scale + zero), -2, 1))


@pytest.mark.parametrize(
    "h",
    [np.zeros((WIDTH, WIDTH)), np.full((WIDTH, WIDTH), np.nan), -np.eye(WIDTH), np.ones((WIDTH, WIDTH)),
     np.eye(WIDTH) * 1e-30,
     np.diag(np.r_[1e12, np.full(WIDTH - 1, 1e-12)])],
    ids=["zeros", "nan", "negative", "singular", "tiny", "ill-conditioned"],
)  # fmt: skip
def test_bad_moments_still_give_sound_weights(h: np.ndarray) -> None:
    w = weights()
    q = gptq(w, prepare_hessian(h.astype(np.float32), 1e-9), *CASES[0])
    assert np.isfinite(q.scale).all()
    assert np.isfinite(q.zero_point).all()
    assert np.linalg.norm(np.asarray(dequantize(q)) - w) < np.linalg.norm(w)


def test_damping_grows_until_the_matrix_can_be_factored() -> None:
    h = moment(WIDTH)
    h -= 0.3 * np.trace(h) / WIDTH * np.eye(WIDTH, dtype=np.float32)  # has negative eigenvalues
    found = prepare_hessian(h, 1e-6)
    assert np.isfinite(found.u).all()
    added = np.diagonal(found.h) - np.diagonal(h) / np.maximum(np.diagonal(h), 0).mean()
    assert 1e-6 < added[np.diagonal(h) > 0].mean() < 100


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, group_size=100), QuantSpec(4, group_size=64)])
def test_grids_that_cross_rows_are_refused(spec: QuantSpec) -> None:
    with pytest.raises(ConfigError, match="takes matrices with channels, or groups that divide a row; found"):
        gptq(weights(), prepare_hessian(jnp.eye(WIDTH)), spec, symmetric=True)
