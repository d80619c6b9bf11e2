"""Tensors through tiles: the same bytes as all at once, in few compilations, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import compilations

from aq_jax import AqError, QuantizationConfig, native, quantize
from aq_jax.ops.kernels import VARIABLE
from aq_jax.quantizers.candidates import Quantized
from aq_jax.quantizers.eligibility import Refused, to_float16
from aq_jax.quantizers.lookup import quantizer_of
from aq_jax.quantizers.tile_programs import solve_tile
from aq_jax.quantizers.tiles import quantize_array, quantize_pieces

ABSMAX = {"solver": "absmax", "symmetric": True}
MINMAX = {"solver": "minmax", "symmetric": False}


def config(bits: int = 8, solver: dict = ABSMAX, **more: object) -> QuantizationConfig:
    return QuantizationConfig(quant_type=f"int{bits}", **(solver | ({"per_channel": False} if not more else {}) | more))


def tiled(w: np.ndarray, c: QuantizationConfig) -> Quantized:
    result = quantize_array(w, c, "w")
    assert isinstance(result, Quantized)
    return result


def granularity(c: QuantizationConfig) -> dict[str, int]:
    return {"per_channel": c.spec.per_channel, "group_size": c.spec.group_size}


def assert_measures(w: np.ndarray, c: QuantizationConfig, found: Quantized) -> None:
    """cosine and rel_mse are those of float64."""
    codes = oracle.stream_codes(found.data, c.spec.bits, w.size)
    v = oracle.dequantize(codes, found.scales, found.zero_points, w.shape, **granularity(c)).astype(np.float64).ravel()
    x = w.astype(np.float64).ravel()
    assert found.rel_mse == pytest.approx(((x - v) ** 2).sum() / (x**2).sum(), rel=1e-5, abs=1e-12)
    assert found.cosine == pytest.approx((x @ v) / math.sqrt((x @ x) * (v @ v)), rel=1e-5)


ROADS = [
    pytest.param((300, 250), config(2, group_size=32), id="groups over two tiles, the last is short"),
    pytest.param((3, 7), config(2, group_size=32), id="less than a group", marks=pytest.mark.slow),
    pytest.param((37, 29), config(3, group_size=32), id="three bits"),
    pytest.param((53, 31), config(4, MINMAX, group_size=13), id="groups of odd size"),
    pytest.param((700, 100), config(8, MINMAX, per_channel=True), id="channels over two tiles"),
    pytest.param((9, 37), config(2, per_channel=True), id="channels that are no whole bytes", marks=pytest.mark.slow),
    pytest.param((9, 36), config(2, per_channel=True), id="channels of whole bytes, shorter than a bucket"),
    pytest.param((7, 11, 13), config(8, per_channel=True), id="channels of two axes", marks=pytest.mark.slow),
    pytest.param((2, 270000), config(8, MINMAX, per_channel=True), id="channels longer than a tile"),
    pytest.param((3, 70001), config(3, per_channel=True), id="such channels that are no whole bytes"),
    pytest.param((2, 270000), config(2, group_size=270001), id="a group longer than a tile, the last is short"),
    pytest.param((3, 50001), config(8, MINMAX), id="tensor"),
    pytest.param((5, 3), config(4, per_channel=False), id="a small tensor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "c"), ROADS)
def test_the_tiled_tensor_is_the_oracle(
    shape: tuple[int, ...], c: QuantizationConfig, rng: np.random.Generator
) -> None:
    magnitudes = 10.0 ** rng.uniform(-2, 2, shape[0])
    w = (rng.normal(size=shape).T * magnitudes).T.astype(np.float32)
    found = tiled(w, c)
    codes, scales, zero_points = oracle.quantize(w, c.spec.bits, quantizer_of(c).name, **granularity(c))
    assert np.array_equal(found.scales, scales)
    assert np.array_equal(found.zero_points, zero_points)
    assert found.data.size == -(-w.size * c.spec.bits // 8)
    assert np.array_equal(oracle.stream_codes(found.data, c.spec.bits, w.size), codes)
    assert_measures(w, c, found)
    # Spare bits of the last byte are zero.
    assert w.size * c.spec.bits % 8 == 0 or found.data[-1] < 1 << (w.size * c.spec.bits % 8)


@pytest.mark.parametrize(
    "c", [config(2, group_size=32), config(8, MINMAX, per_channel=True)], ids=["groups", "channels"]
)
def test_tiled_is_all_at_once(c: QuantizationConfig, rng: np.random.Generator) -> None:
    w = rng.normal(size=(37, 29)).astype(np.float32)
    found, q = tiled(w, c), quantize(w, c)
    assert np.array_equal(found.scales, np.asarray(q.scale).ravel())
    assert np.array_equal(found.zero_points, np.asarray(q.zero_point).ravel())
    assert np.array_equal(oracle.stream_codes(found.data, c.spec.bits, w.size), oracle.codes_of(q).ravel())


@pytest.mark.parametrize(
    "symmetric", [pytest.param(True, marks=pytest.mark.slow), False], ids=["symmetric", "asymmetric"]
)
def test_mse_through_tiles_is_as_good_as_all_at_once(symmetric: bool, rng: np.random.Generator) -> None:
    # The sums are added up in another order, so that a scale may end on its neighbour.
    c = QuantizationConfig(quant_type="int2", group_size=64, symmetric=symmetric)
    w = rng.normal(size=(32, 128)).astype(np.float32)
    found, q = tiled(w, c), quantize(w, c)
    assert_measures(w, c, found)
    v = oracle.dequantize(oracle.codes_of(q), np.asarray(q.scale), np.asarray(q.zero_point), w.shape, group_size=64)
    whole = ((w.astype(np.float64) - v) ** 2).sum() / (w.astype(np.float64) ** 2).sum()
    assert found.rel_mse == pytest.approx(whole, rel=1e-3)


def test_a_short_last_group_is_searched_as_if_it_were_alone(rng: np.random.Generator) -> None:
    c = QuantizationConfig(quant_type="int2", group_size=64, symmetric=False)
    w = rng.normal(size=(1, 160)).astype(np.float32)
    whole, alone = tiled(w, c), tiled(w[:, 128:], c)
    # What fills the group up weighs nothing: it is no worse than a whole group of the same elements, each twice.
    twice = tiled(np.tile(w[:, 128:], 2), c)
    assert alone.rel_mse == pytest.approx(twice.rel_mse, rel=0.01)
    assert (whole.scales[-1], whole.zero_points[-1]) == (alone.scales[0], alone.zero_points[0])
    assert whole.data[-8:].tolist() == alone.data.tolist()


def test_mse_of_one_long_group(rng: np.random.Generator) -> None:
    c = QuantizationConfig(quant_type="int4", per_channel=False, symmetric=False)
    w = (rng.normal(size=(2, 40000)) + 0.5).astype(np.float32)
    found = tiled(w, c)
    assert_measures(w, c, found)
    codes, scales, zeros = oracle.quantize(w, 4, "minmax")
    baseline = oracle.dequantize(codes, scales, zeros, w.shape).astype(np.float64)
    assert found.rel_mse < 0.8 * ((baseline - w) ** 2).sum() / (w.astype(np.float64) ** 2).sum()


PIECES = [
    pytest.param((300, 250), config(2, group_size=32), [0, 32, 4096, 65536, 75000], id="groups"),
    pytest.param((37, 29), config(3, group_size=32), [0, 512, 1073], id="three bits"),
    pytest.param((48, 37), config(8, MINMAX, per_channel=True), [0, 37 * 8, 37 * 40, 37 * 48], id="channels"),
    pytest.param((3, 100001), config(8, MINMAX), [0, 8, 270000, 300003], id="tensor, whose scale each piece repeats"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "c", "cuts"), PIECES)
def test_pieces_are_the_whole(
    shape: tuple[int, ...], c: QuantizationConfig, cuts: list[int], rng: np.random.Generator
) -> None:
    w = rng.normal(size=shape).astype(np.float32)
    whole = tiled(w, c)
    spans = list(pairwise(cuts))
    found = quantize_pieces(w, c, "w", spans)
    assert not isinstance(found, Refused)
    found = list(found)
    assert len(found) == len(spans)
    assert np.array_equal(np.concatenate([piece.data for piece in found]), whole.data)
    if c.spec.quant_axis == -1:
        assert all(np.array_equal(piece.scales, whole.scales) for piece in found)
    else:
        assert np.array_equal(np.concatenate([piece.scales for piece in found]), whole.scales)
        assert np.array_equal(np.concatenate([piece.zero_points for piece in found]), whole.zero_points)
    # A piece's measures are its own; weighted by their weights they add up to the whole's.
    weights = [(w.ravel()[a:b].astype(np.float64) ** 2).sum() for a, b in spans]
    total = sum(piece.rel_mse * weight for piece, weight in zip(found, weights, strict=True)) / sum(weights)
    assert total == pytest.approx(whole.rel_mse, rel=1e-5)


@pytest.mark.parametrize(
    ("group_size", "cuts"), [(24, [0, 120, 528, 768]), (0, [0, 200, 768])], ids=["groups", "tensor"]
)
def test_pieces_of_a_rotated_tensor_may_end_inside_a_block(
    group_size: int, cuts: list[int], rng: np.random.Generator
) -> None:
    w = rng.normal(size=(8, 96)).astype(np.float32)
    c = config(4, group_size=group_size, per_channel=None if group_size else False, rotate=True)
    whole, found = tiled(w, c), quantize_pieces(w, c, "w", list(pairwise(cuts)))
    assert c.spec_for(w.shape, "w").rotation == 32
    assert not isinstance(found, Refused)
    found = list(found)
    assert np.array_equal(np.concatenate([piece.data for piece in found]), whole.data)
    scales = np.concatenate([piece.scales for piece in found])
    assert np.array_equal(scales, whole.scales if group_size else np.repeat(whole.scales, 2))
    # Rotated numbers differ by as much as those that they stand for.
    values = oracle.dequantize(oracle.stream_codes(whole.data, 4, w.size), whole.scales, whole.zero_points, w.shape,
                               group_size=group_size)  # fmt: skip
    error = ((oracle.unrotate(values, 32) - w.astype(np.float64)) ** 2).sum() / (w.astype(np.float64) ** 2).sum()
    assert whole.rel_mse == pytest.approx(error, rel=1e-4)


def test_symmetric_mse_in_pieces_has_one_zero_point(rng: np.random.Generator) -> None:
    # One half alone would take the other way of rounding.
    w = np.concatenate([rng.choice([-0.7, 0, 0.7], (8, 128), p=[0.02, 0.96, 0.02]), 30 * rng.normal(size=(24, 128))])
    w = w.astype(np.float32)
    c = QuantizationConfig(quant_type="int2", group_size=64)
    assert not tiled(w[:8], c).zero_points.any()
    pieces = list(quantize_pieces(w, c, "w", [(0, 1024), (1024, 4096)]))
    zeros = np.concatenate([p.zero_points for p in pieces])
    scales = np.concatenate([p.scales for p in pieces])
    assert set(zeros[scales != 1].tolist()) == {-0.5}


COUNTED = np.arange(160).reshape(5, 32)


@pytest.mark.parametrize(
    "w",
    [
        np.asfortranarray(COUNTED, np.float32),
        np.arange(640, dtype=np.float32).reshape(20, 32)[::4],
        COUNTED.astype(ml_dtypes.bfloat16),
        COUNTED.astype(np.float16),
        COUNTED.astype(np.float64),
        (COUNTED % 16).astype(ml_dtypes.float8_e4m3fn),
    ],
    ids=["Fortran order", "a view", "bfloat16", "float16", "float64", "float8"],
)
def test_other_strides_and_dtypes(w: np.ndarray) -> None:
    found = tiled(w, config(2, group_size=32))
    codes, scales, _ = oracle.quantize(np.asarray(w, np.float32), 2, "absmax", group_size=32)
    assert np.array_equal(found.scales, scales)
    assert np.array_equal(oracle.stream_codes(found.data, 2, 160), codes)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize(
    "c", [config(2, group_size=32), config(8, per_channel=True), config(8)], ids=["groups", "channels", "tensor"]
)
def test_tensors_without_elements(shape: tuple[int, ...], c: QuantizationConfig) -> None:
    found = tiled(np.zeros(shape, np.float32), c)
    assert found.data.size == 0
    assert found.scales.tolist() == [1.0] * c.spec.group_count(shape)
    assert (found.cosine, found.rel_mse) == (1.0, 0.0)


@pytest.mark.parametrize("c", [config(2, group_size=32), config(8)], ids=["groups", "tensor"])
def test_measures_of_zeros(c: QuantizationConfig) -> None:
    found = tiled(np.zeros((4, 64), np.float32), c)
    assert (found.cosine, found.rel_mse) == (1.0, 0.0)


def test_measures_of_extreme_numbers(rng: np.random.Generator) -> None:
    # Squares of these are no float32.
    for factor in (1e-30, 1e30):
        w = (rng.normal(size=(37, 29)) * factor).astype(np.float32)
        assert_measures(w, config(3, group_size=32), tiled(w, config(3, group_size=32)))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantize by compiled programs: the native library needs none."""
    monkeypatch.setenv(VARIABLE, "xla")


@pytest.mark.usefixtures("compiled")
def test_a_grouped_config_compiles_once_for_all_shapes(rng: np.random.Generator) -> None:
    c = config(4, group_size=40)  # a size that no other test uses
    before = solve_tile._cache_size()
    for shape in [(3, 7), (40, 40), (41, 39), (700, 100), (1, 1), (2, 70000), (5, 6, 7)]:
        tiled(rng.normal(size=shape).astype(np.float32), c)
    assert solve_tile._cache_size() - before == 1


@pytest.mark.usefixtures("compiled")
def test_channels_compile_once_a_bucket(rng: np.random.Generator) -> None:
    c = config(4, per_channel=True)
    before = solve_tile._cache_size()
    for width in (1, 3, 100, 128, 129, 200, 256):
        tiled(rng.normal(size=(5, width)).astype(np.float32), c)
    assert solve_tile._cache_size() - before == 2  # up to 128, up to 256


@pytest.mark.parametrize("c", [config(2, group_size=56), config(8, per_channel=True)], ids=["groups", "channels"])
@pytest.mark.parametrize("kernel", ["xla", "native"])
def test_a_model_of_many_shapes_compiles_few_programs(
    c: QuantizationConfig, kernel: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where the native library quantizes."""
    if kernel == "native" and not native.load().available:
        pytest.skip("no native library")
    monkeypatch.setenv(VARIABLE, kernel)
    jax.clear_caches()
    with compilations() as programs:
        for shape in [(3, 70), (64, 64), (65, 63), (700, 100), (5, 6, 7)]:
            tiled(rng.normal(size=shape).astype(np.float32), c)
    assert 1 <= len(programs) <= 3 if kernel == "xla" else not programs


# What is wrong with a [40, 60] tensor -> the error. Index [9, 20] is element 560 of the flattened tensor.
WRONG = [
    pytest.param([((9, 20), np.nan)], r"^w: 1 of 2400 values are not finite \(first at \[9, 20\]\); repair it, or keep "
                 'the tensor unquantized with on_nonfinite = "keep"$', id="NaN"),
    pytest.param([((9, 20), np.inf), ((9, 21), -np.inf), ((30, 0), np.nan)],
                 r"^w: 3 of 2400 values are not finite \(first at \[9, 20\]\)", id="infinities"),
    pytest.param([((9, 20), 3.3e38), ((9, 21), -3.3e38)], r"^w: the scale of group \d+, whose largest value is "
                 r"3\.3e\+38, is outside \[2\^-126, 2\^126\]", id="too large"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "text"), WRONG)
@pytest.mark.parametrize(
    "c",
    [config(2, group_size=32), config(2, per_channel=True), config(2, per_channel=False, group_size=100000)],
    ids=["groups", "channels", "a long group"],
)
def test_what_is_refused(
    values: list[tuple[tuple[int, int], float]], text: str, c: QuantizationConfig, rng: np.random.Generator
) -> None:
    w = rng.normal(size=(40, 60)).astype(np.float32)
    for at, value in values:
        w[at] = value
    with pytest.raises(AqError, match=text):
        quantize_array(w, c, "w")
    keep = dataclasses.replace(c, on_nonfinite="keep")
    kept = quantize_array(w, keep, "w")
    assert isinstance(kept, Refused)
    assert kept.why.startswith("w: ")
    # All at once refuses the same.
    with pytest.raises(AqError, match=text):
        quantize(w, c, name="w")
    assert np.array_equal(quantize(w, keep, name="w"), w, equal_nan=True)


def test_a_first_index_beyond_the_first_tile() -> None:
    w = np.zeros((3, 50000), np.float32)
    w[2, 49999] = np.nan
    with pytest.raises(AqError, match=r"1 of 150000 values are not finite \(first at \[2, 49999\]\)"):
        quantize_array(w, config(8), "w")


@pytest.mark.parametrize("c", [config(2, group_size=32), config(8)], ids=["groups", "tensor"])
def test_numbers_too_small_for_any_scale_are_refused(c: QuantizationConfig) -> None:
    w = np.zeros((4, 64), np.float32)
    w[1, 3] = 1e-42
    with pytest.raises(AqError, match=r"w: the scale of group \d+, whose largest value is .*e-42, is outside"):
        quantize_array(w, c, "w")


def test_a_float64_beyond_float32_is_refused() -> None:
    w = np.ones((1, 64))
    w[0, 3] = 1e300
    with pytest.raises(AqError, match=r"1 of 64 values are not finite \(first at \[0, 3\]\)"):
        quantize_array(w, config(2, group_size=32), "w")


@pytest.mark.parametrize(
    ("values", "half"),
    [
        ([1.0, -2.5, 0.0], True),
        ([1.0, 1e-9], True),  # lost, but next to 1.0 nobody misses it
        ([65280.0, 1.0], True),
        ([65536.0, 1.0], False),  # rounds to infinity
        ([1e-9, 2e-9], False),  # all of it lost
        ([1e-4, 2e-4], True),
        ([6e-8 * 1.4, 0.0], False),  # a subnormal half: a quarter of its value
        ([0.0, 0.0], True),
        ([np.nan, 1.0], False),  # keeps its own dtype, whatever it is
        ([np.inf, 1.0], False),
        ([], True),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_what_fits_into_half(values: list[float], half: bool, dtype: type) -> None:
    w = np.array(values).astype(dtype)
    found = to_float16(w)
    assert found.dtype == (np.float16 if half else dtype)
    wide = w.astype(np.float32)
    if half:
        assert np.abs(found.astype(np.float32) - wide).max(initial=0) <= np.abs(wide).max(initial=0) * 2**-10
    else:
        assert found is w


@pytest.mark.parametrize(("steps", "half"), [(600.5, True), (400.5, False)])
def test_the_bound_of_half_is_two_to_the_minus_ten(steps: float, half: bool) -> None:
    # Halfway between two subnormal halves, which lie 2^-24 apart: the error is 0.5 / steps of the value.
    assert (to_float16(np.array([steps * 2.0**-24], np.float32)).dtype == np.float16) is half
