"""Trellis codes against an exact search in NumPy, and against the laws of what the search may depend on."""

from __future__ import annotations

import itertools

import independent_reader
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import moment

import aq_jax as aq
from aq_jax import AqError, QuantizationConfig
from aq_jax.codes import CODES
from aq_jax.codes.trellis_numpy import level_table
from aq_jax.native import host
from aq_jax.quantizers.gptq import GPTQ
from aq_jax.quantizers.hessian import prepare_hessian
from aq_jax.quantizers.trellis import encode_matrices, encoder, solve_matrix

KINDS = ("tcq5", "tcq4", "tcq3", "tcq2", "tcq1.5")
native = pytest.mark.skipif(not host.encodes_trellis(), reason="no native library")


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = np.exp(0.5 * rng.standard_normal((rows, 1)))
    return (sizes * rng.standard_normal((rows, columns))).astype(np.float32)


def read(kind: str, data: np.ndarray, scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Decode by the reader that knows the format's page alone."""
    row = {
        "quant_type": kind, "data": data.tobytes(), "scales": scales.tobytes(), "zero_points": b"", "shape": shape,
        "num_params": int(np.prod(shape)), "quant_axis": 0, "group_size": 0, "rotation": 0, "dtype": "float32",
    }  # fmt: skip
    return np.asarray(independent_reader.decode(row), np.float64).reshape(shape)


def least_error(kind: str, w: np.ndarray, scales: np.ndarray) -> float:
    """Find the least squared error of one tile of these scales: by the best path that ends where it began, for all."""
    code = CODES[kind]
    bits, values = code.step_bits, code.step_rows  # type: ignore[attr-defined]
    levels = level_table(values).astype(np.float64)
    ends, new = 4096 >> bits, 1 << bits
    targets, sizes = w.T.reshape(-1, values), np.tile(scales, w.shape[1]).reshape(-1, values)
    states = np.arange(4096)
    costs = np.where(np.arange(ends)[:, None] == np.arange(ends), 0.0, np.inf)  # [where it began, where it is]
    for target, size in zip(targets, sizes, strict=True):
        error = ((target - levels * size) ** 2).sum(axis=1)
        # The states before end alike in their high bits: their ends are m = state & (ends - 1).
        through = costs[:, states & (ends - 1)] + error
        costs = through.reshape(ends, ends, new).min(axis=2)
    return float(np.diagonal(costs).min())


@pytest.mark.parametrize("kind", ["tcq5", "tcq1.5"])
def test_tiles_are_within_a_tenth_of_the_best_path(kind: str) -> None:
    found, least = 0.0, 0.0
    for seed in range(4):
        w = weights(8, 4, seed)
        data, scales, sums, sound = encode_matrices(w, CODES[kind])  # type: ignore[arg-type]
        error = ((read(kind, data, scales, w.shape) - w) ** 2).sum()
        np.testing.assert_allclose(sums[2], error, rtol=1e-5)
        assert sound
        best = least_error(kind, w, scales)
        assert error >= best * (1 - 1e-5)
        found, least = found + error, least + best
    assert found < 1.15 * least


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_of_its_errors_is_what_a_reader_finds(kind: str) -> None:
    w = weights(280, 12)
    data, scales, sums, sound = encode_matrices(w, CODES[kind], rounds=1)  # type: ignore[arg-type]
    values = read(kind, data, scales, w.shape)
    wide, d = w.astype(np.float64), w - values
    np.testing.assert_allclose(sums, [(wide * wide).sum(), (wide * d).sum(), (d * d).sum()], rtol=1e-5)
    assert sound
    assert (scales.view(np.uint32) & 0xFFFF == 0).all()


@native
@pytest.mark.parametrize("kind", ["tcq3", "tcq1.5"])
def test_bytes_depend_on_no_number_of_threads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, under, found = weights(600, 20), prepare_hessian(moment(20)), []
    spec = QuantizationConfig(kind).spec_for(w.shape, "w")
    for threads in (1, 5):
        monkeypatch.setattr(host, "cores", lambda threads=threads: threads)
        found.append([encode_matrices(w, spec.coding).data, solve_matrix(w, under, spec).codes])  # type: ignore[arg-type]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rotation", [0, 32])
def test_under_a_hessian_outputs_change_less_and_rounds_never_hurt(rotation: int) -> None:
    w, h = weights(48, 96), moment(96)
    under, spec = prepare_hessian(h, 1e-4, rotation), QuantizationConfig("tcq2", rotate=rotation > 0).spec
    spec = type(spec)(spec.bits, spec.per_channel, rotation=rotation, code=spec.code)

    def error(q: aq.QTensor) -> float:
        change = np.asarray(aq.dequantize(q), np.float64) - w
        return float(np.einsum("ri,ij,rj->", change, h.astype(np.float64), change))

    free = aq.quantize(w, QuantizationConfig("tcq2"))
    errors = [error(solve_matrix(w, under, spec, rounds=rounds)) for rounds in (0, 1, 2, 4)]
    assert errors[0] < 0.75 * error(free)
    assert all(after < before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[2] < 0.97 * errors[0]
    quick = GPTQ().solve(w, under, spec, True, quick=True)
    np.testing.assert_array_equal(quick.codes, solve_matrix(w, under, spec, rounds=1).codes)


@native
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("tcq2", (40, 12)), *(pytest.param(kind, (300, 20), marks=pytest.mark.slow) for kind in KINDS)],
)
def test_xla_finds_codes_of_equal_error(kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    w, code, h = weights(*shape), CODES[kind], moment(shape[1])
    under = (h, np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(h.astype(np.float64))).T, np.float32))
    for hessian, weight in ((None, np.eye(shape[1])), (under, h)):
        errors = []
        for kernel in ("native", "xla"):
            monkeypatch.setenv(host.VARIABLE, kernel)
            assert encoder().startswith("xla") == (kernel == "xla")
            data, scales, *_ = encode_matrices(w, code, hessian)  # type: ignore[arg-type]
            change = read(kind, data, scales, shape) - w
            errors.append(np.einsum("ri,ij,rj->", change, weight, change))
        np.testing.assert_allclose(errors[1], errors[0], rtol=0.02)


def test_quantize_is_the_same_under_jit_and_in_trees() -> None:
    w, config = jnp.asarray(weights(2 * 20, 12).reshape(2, 20, 12)), QuantizationConfig("tcq4")
    q = aq.quantize(w, config)
    assert isinstance(q, aq.QTensor)
    traced = jax.jit(lambda w: aq.quantize(w, config))(w)
    assert jax.tree.structure(traced) == jax.tree.structure(q)
    assert jax.tree.map(jnp.shape, traced) == jax.tree.map(jnp.shape, q)
    errors = [float(jnp.sum((aq.dequantize(each) - w) ** 2)) for each in (q, traced)]
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.02)
    (leaf,) = jax.tree.leaves(aq.quantize_tree({"w": w}, config), is_leaf=lambda x: isinstance(x, aq.QTensor))
    np.testing.assert_array_equal(leaf.codes, q.codes)


def test_rows_of_zeros_are_nearly_zeros_and_what_has_no_scale_is_refused() -> None:
    w = weights(8, 8)
    w[3] = 0
    q = aq.quantize(w, "tcq3")
    assert float(jnp.abs(aq.dequantize(q)[3]).max()) < 1e-25
    for wrong, text in ((np.nan, "are not finite"), (1e-39, "scale of group 3")):
        w[3] = wrong
        with pytest.raises(AqError, match=text):
            aq.quantize(w, "tcq3")
        kept = aq.quantize(w, QuantizationConfig("tcq3", on_nonfinite="keep"))
        assert not isinstance(kept, aq.QTensor)


def test_sizes_of_rows_do_not_matter() -> None:
    w = weights(16, 8)
    factors = 2.0 ** np.arange(-8, 8, dtype=np.float32)[:, None]
    small = encode_matrices(w * np.float32(2.0**-90), CODES["tcq3"])  # type: ignore[arg-type]
    np.testing.assert_array_equal(small.data, encode_matrices(w, CODES["tcq3"]).data)  # type: ignore[arg-type]
    large = encode_matrices(w * factors * np.float32(2.0**90), CODES["tcq3"])  # type: ignore[arg-type]
    assert large.sound
    assert large.sums[2] < 0.05 * large.sums[0]
