"""Codes and bytes become the numbers that the format says, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import oracle
import pytest

from aq_jax.codes.bits import unpack_codes
from aq_jax.errors import FormatError
from aq_jax.store import DTYPES, Row, aligned_empty, decode, dequantize_rows, raw_array
from aq_jax.store.casts import saturated

SHAPES = ((), (0,), (5,), (0, 4), (3, 0), (3, 7), (4, 32), (2, 3, 5), (3, 40000))
rng = np.random.default_rng(0)


def row(shape: tuple[int, ...], bits: int, axis: int, size: int, scale: float = 1.0) -> Row:
    count = int(np.prod(shape))
    groups = -(-count // size) if size else shape[0] if axis == 0 else 1
    data = rng.integers(0, 256, -(-count * bits // 8)).astype(np.uint8)
    scales = (rng.uniform(0.5, 1.5, groups) * scale).astype(np.float32)
    zeros = rng.uniform(-3, 3, groups).astype(np.float32)
    return Row("w", shape, "float32", data, count, f"int{bits}", scales, zeros, axis, size)


def formula(r: Row) -> np.ndarray:
    assert r.bits is not None
    codes = unpack_codes(r.data, r.bits, r.num_params)
    return oracle.dequantize(codes, r.scales, r.zero_points, r.shape, r.quant_axis == 0, r.group_size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize(("axis", "size"), [(-1, 0), (0, 0), (0, 1), (0, 8), (0, 33), (0, 100_000)])
def test_dequantizing_is_the_formula(shape: tuple[int, ...], bits: int, axis: int, size: int) -> None:
    if axis == 0 and size == 0 and not shape:
        pytest.skip("no channels")
    case = row(shape, bits, axis, size)
    for zeros in (case.zero_points, np.full_like(case.zero_points, -0.5), np.zeros_like(case.zero_points)):
        r = Row("w", shape, "float32", case.data, case.num_params, f"int{bits}", case.scales, zeros, axis, size)
        found = decode([r])
        assert found.shape == shape
        assert found.dtype == np.float32
        assert found.flags.writeable
        assert not found.size or found.ctypes.data % 64 == 0  # NumPy invents an address for no elements
        assert (found == formula(r)).all()


def test_results_below_the_smallest_normal_number_are_zero() -> None:
    codes = np.array([-128, -1, 0, 1, 2, 127], np.int8).view(np.uint8)
    tiny = np.array([2.0**-126], np.float32)
    zeros = np.array([0.5], np.float32)
    found = decode([Row("w", (6,), "float32", codes, 6, "int8", tiny, zeros)])
    wanted = (codes.view(np.int8).astype(np.float64) - 0.5) * 2.0**-126
    assert (found == np.where(abs(wanted) < 2.0**-126, 0, wanted)).all()
    assert found[2] == 0
    # A denormal zero point is none, however large the scale.
    zeros = np.array([1e-40], np.float32)
    assert decode([Row("w", (6,), "float32", codes, 6, "int8", tiny * 0 + 2.0**100, zeros)])[2] == 0


@pytest.mark.parametrize("block", [2, 8])
def test_rotated_rows_are_unrotated(block: int) -> None:
    r = row((4, 8), 4, 0, 0)
    rotated = Row("q.weight", r.shape, r.dtype, r.data, 32, "int4h", r.scales, r.zero_points, 0, 0, block)
    wanted = oracle.unrotate(dequantize_rows([r]), block)
    np.testing.assert_allclose(dequantize_rows([rotated]), wanted, rtol=1e-5, atol=1e-6)


def raw(values: np.ndarray, dtype: str, quant_type: str | None = "none") -> Row:
    return Row("b", values.shape, dtype, values.reshape(-1).view(np.uint8), values.size, quant_type)


def test_a_plain_row_is_a_read_only_view() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = raw_array([raw(values, "float32")])
    assert (found == values).all()
    assert np.shares_memory(found, values)
    assert not found.flags.writeable


def test_misaligned_bytes_are_copied() -> None:
    memory = np.zeros(9, np.uint8)
    memory[1:] = np.array([1, 2], np.float32).view(np.uint8)
    found = raw_array([Row("b", (2,), "float32", memory[1:], 2)])
    assert found.tolist() == [1, 2]
    assert found.flags.aligned


def test_half_rows_take_the_dtype_column_s_dtype() -> None:
    half = np.array([0.5, 1.5, -2], np.float16)
    for dtype in ("float32", "bfloat16", "float16"):
        found = raw_array([raw(half, dtype, "fp16")])
        assert found.dtype.name == dtype
        assert found.astype(np.float32).tolist() == [0.5, 1.5, -2]
    assert raw_array([raw(half * 2, "int64", "fp16")]).tolist() == [1, 3, -4]


@pytest.mark.parametrize(
    ("dtype", "held", "lost"),
    [
        ("int8", [-128, 127, -0.0], [300.7, 1.5, 128, -129, np.nan, np.inf]),
        ("uint8", [0, 255], [-1, 256]),
        ("int32", [-(2.0**31), 2.0**31 - 128], [2.0**31, -(2.0**31) - 256]),
        ("int64", [-(2.0**63)], [2.0**63]),
        ("uint64", [2.0**63], [2.0**64]),
        ("bool", [0, 1], [2, 0.5, -1]),
        ("float16", [65519, np.inf, np.nan, 1e-30], [65520, -1e6]),
        ("bfloat16", [3e38, np.inf], [3.4e38]),
        ("float8_e4m3fn", [-464, np.nan], [465, np.inf]),
        ("float8_e8m0fnu", [0.5, 2, np.nan], [0, -1]),
        ("complex64", [-1.5, np.inf], []),
    ],
)
def test_a_row_of_floats_holds_only_what_its_dtype_does(dtype: str, held: list[float], lost: list[float]) -> None:
    wanted = DTYPES[dtype]
    assert (
        raw_array([raw(np.array(held, np.float32), dtype, "fp32")]).tobytes() == np.array(held).astype(wanted).tobytes()
    )
    for value in lost:
        values = np.resize(np.array([1, 0.5] if wanted.kind not in "iub" else [1], np.float32), 100_000)
        values[-1] = value  # beyond a block
        what = rf"^m: b: holds the float32 value {re.escape(f'{values[-1]}')}, which {dtype} cannot hold; wanted only"
        with pytest.raises(FormatError, match=what):
            raw_array([raw(values, dtype, "fp32")], Path("m"))


@pytest.mark.parametrize(
    ("dtype", "values", "wanted"),
    [
        ("int8", [12700, -12800, 300, 2.5, -1.6], [127, -128, 127, 2, -2]),
        ("uint8", [-3, 255.4, 256], [0, 255, 255]),
        ("int32", [2.0**31, 2.0**31 - 128, -(2.0**40)], [2**31 - 1, 2**31 - 128, -(2**31)]),
        ("int64", [2.0**63, -1e30], [2**63 - 1, -(2**63)]),
        ("uint64", [2.0**64, -1], [2**64 - 1, 0]),
        ("bool", [-100, 0.4, 0.6, 3], [False, False, True, True]),
        ("float16", [1e6, -1e6, 0.5], [65504, -65504, 0.5]),
        ("float8_e4m3fn", [1e6, -1e6, 0.5], [448, -448, 0.5]),
        ("float64", [1e30], [np.float64(np.float32(1e30))]),
    ],
)
def test_dequantized_values_become_the_nearest_that_their_dtype_has(
    dtype: str, values: list[float], wanted: list[float]
) -> None:
    for shape in ((len(values),), (1, len(values), 1)):
        found = saturated(np.array(values, np.float32).reshape(shape), DTYPES[dtype])
        assert (found.dtype, found.shape, found.reshape(-1).tolist()) == (DTYPES[dtype], shape, wanted)
    assert saturated(np.array(values[0], np.float32), DTYPES[dtype]).shape == ()


def test_bytes_that_are_no_bool_are_refused() -> None:
    with pytest.raises(FormatError, match="b: holds bytes other than 0 and 1"):
        raw_array([raw(np.array([0, 2], np.uint8), "bool")])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7)])
def test_aligned_memory(shape: tuple[int, ...]) -> None:
    for dtype in ("float32", "int8", "float64"):
        memory = aligned_empty(shape, dtype)
        assert memory.shape == shape
        assert not memory.size or memory.ctypes.data % 64 == 0
        assert memory.flags.writeable
