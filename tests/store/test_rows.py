"""Every rule that a row must keep, each broken once."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from math import lcm, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aq_jax.errors import FormatError
from aq_jax.store import Row, check, parse_dtype, pieces
from aq_jax.store.row_rules import RowOrder


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


GOOD = Row("w", (3, 7), "float32", np.zeros(6, np.uint8), 21, "int2", floats(1, 1, 1), floats(0, 0, 0), 0, 0)
RAW = Row("b", (3,), "float32", np.zeros(12, np.uint8), 3, "none")
TILED = Row("w", (6, 7), "float32", np.zeros(11, np.uint8), 42, "tcq2", floats(*[1] * 6), floats(), 0, 0)
HALVES, BYTES = np.ones(3, np.float16), np.zeros(3, np.int8)
SMALL = replace(GOOD, quant_type="int2_f16i", scales=HALVES, zero_points=BYTES)
ROTATED = replace(GOOD, shape=(3, 8), num_params=24, quant_type="int2h", rotation=8)

BROKEN = [
    (replace(GOOD, layer_name=""), "layer_name must be a non-empty string"),
    (replace(GOOD, layer_name="\ud800"), "valid Unicode"),
    (replace(GOOD, dtype="float99"), "unknown dtype 'float99'; known are float64, "),
    (
        replace(GOOD, quant_type="int9"),
        "unknown quant_type 'int9'; known are int8, int6, int5, int4",
    ),
    (replace(GOOD, shape=(3, -7)), r"shape \[3, -7\] has an axis outside 0 to 2\^31 - 1"),
    (replace(GOOD, shape=(1,) * 65), "shape has 65 axes, at most 64"),
    (replace(GOOD, shape=(2**30, 2**30, 2**30)), "too large for any memory"),
    (replace(GOOD, shape=(np.int64(2**31 - 1),) * 3), "too large for any memory"),  # whose product would overflow
    (replace(GOOD, shape=(0, 2**30, 2**30), num_params=0), "too large for any memory"),
    (replace(GOOD, num_params=22), r"num_params is 22, shape \[3, 7\] has 21 elements"),
    (replace(GOOD, num_params=0), r"num_params is 0, shape \[3, 7\] has 21 elements"),
    (replace(GOOD, num_params=-21), "num_params is -21"),
    (replace(GOOD, data=np.zeros(5, np.uint8)), r"data holds 5 bytes, shape \[3, 7\] int2 needs 6"),
    (replace(GOOD, data=np.zeros(7, np.uint8)), r"data holds 7 bytes, shape \[3, 7\] int2 needs 6"),
    (replace(GOOD, data=np.zeros(6, np.int8)), "data must be a uint8 array of one axis, not int8"),
    (replace(GOOD, scales=floats(1, 1)), r"scales holds 8 bytes, shape \[3, 7\] int2 needs 12"),
    (replace(GOOD, zero_points=floats()), r"zero_points holds 0 bytes, shape \[3, 7\] int2 needs 12"),
    (replace(GOOD, scales=np.ones(3)), "scales must be a float32 array"),
    (replace(GOOD, scales=floats(1, np.nan, 1)), "scales are nan to nan, they must be finite"),
    (replace(GOOD, scales=floats(1, np.inf, 1)), "scales are 1 to inf"),
    (replace(GOOD, scales=floats(1, 0, 1)), "scales are 0 to 1"),
    (replace(GOOD, scales=floats(1, -1, 1)), "scales are -1 to 1"),
    (replace(GOOD, scales=floats(1, 2.0**-127, 1)), r"within 2\^-126 to 2\^126"),
    (replace(GOOD, scales=floats(1, 2.0**126 * 1.5, 1)), r"within 2\^-126 to 2\^126"),
    (replace(GOOD, zero_points=floats(0, np.nan, 0)), "zero_points are not all finite"),
    (replace(GOOD, quant_axis=1), "quant_axis is 1 and group_size 0: must be -1 and 0"),
    (replace(GOOD, quant_axis=-1, group_size=8), "quant_axis is -1 and group_size 8"),
    (replace(GOOD, group_size=-1), "quant_axis is 0 and group_size -1"),
    (replace(GOOD, shape=(), num_params=1), "a tensor without axes cannot be quantized per channel"),
    (replace(GOOD, rotation=4), "rotation is 4, which int2 rows do not have"),
    (replace(ROTATED, rotation=0), r"rotation is 0, int2h of shape \[3, 8\] needs a power of two from 2 to 128"),
    (replace(ROTATED, rotation=6), "rotation is 6, int2h"),
    (replace(ROTATED, rotation=256, shape=(3, 256)), "rotation is 256, int2h"),
    (replace(ROTATED, rotation=16), r"rotation is 16, .* that divides the last axis"),
    (replace(GOOD, quant_type="int2h", rotation=4), r"rotation is 4, int2h of shape \[3, 7\]"),
    (replace(ROTATED, shape=(), num_params=1, quant_axis=-1), r"rotation is 8, int2h of shape \[\] needs"),
    (replace(TILED, data=np.zeros(10, np.uint8)), r"data holds 10 bytes, shape \[6, 7\] tcq2 needs 11"),
    (replace(TILED, zero_points=floats(0)), r"zero_points holds 4 bytes, shape \[6, 7\] tcq2 needs 0"),
    (
        replace(TILED, group_size=14),
        r"\[6, 7\] has one scale a row, quant_axis and group_size 0 and 0, not 0 and 14",
    ),
    (replace(TILED, quant_axis=-1), "quant_axis and group_size 0 and 0, not -1 and 0"),
    (replace(TILED, shape=(42,)), r"tcq2 of shape \[42\] needs a matrix"),
    (replace(TILED, shape=(2, 3, 7)), r"\[2, 3, 7\] has .* 0 and 7, not 0 and 0"),
    (replace(TILED, shape=(42, 1), num_params=42, rotation=2), "rotation is 2, tcq2 of shape"),
    (replace(TILED, shape=(7, 6), quant_type="tcq1.5"), r"tcq1\.5 of shape \[7, 6\] needs an even number of rows"),
    (replace(TILED, shape=(258, 2), num_params=516), "needs 12 bits in each tile .*; the last has 8"),
    (replace(TILED, shape=(0, 7), num_params=0), "needs 12 bits in each tile .*; the last has 0"),
    (replace(SMALL, zero_points=BYTES[:2]), r"zero_points holds 2 bytes, shape \[3, 7\] int2_f16i needs 3"),
    (replace(SMALL, zero_points=HALVES), "zero_points must be a int8 array of one axis, not float16"),
    (replace(SMALL, scales=BYTES), "scales must be a float16 array of one axis, not int8"),
    (replace(SMALL, quant_type="int2_f16z"), "zero_points must be a float16 array of one axis, not int8"),
    (replace(GOOD, digest=b"short"), "digest holds 5 bytes, not 32"),
    (replace(RAW, quant_axis=0), "an unquantized row has -1 and 0"),
    (replace(RAW, scales=floats(1)), r"scales holds 4 bytes, shape \[3\] none needs 0"),
    (replace(RAW, quant_type="fp16"), r"data holds 12 bytes, shape \[3\] fp16 needs 6"),
    (replace(RAW, dtype="int64"), r"data holds 12 bytes, shape \[3\] none needs 24"),
]


@pytest.mark.parametrize(("row", "text"), BROKEN, ids=[text[:40] for _, text in BROKEN])
def test_a_broken_rule_is_named(row: Row, text: str) -> None:
    with pytest.raises(FormatError, match=r"m\.parquet: row 17 \(w\): .*" + text):
        check(row, "m.parquet: row 17 (w)")


def test_good_rows_pass(v1_rows: list[Row], v2_rows: list[Row]) -> None:
    for row in [GOOD, RAW, SMALL, ROTATED, TILED, *v1_rows, *v2_rows]:
        check(row, "here")
    check(replace(RAW, quant_type="fp32", dtype="bfloat16"), "here")


def test_dtypes_are_read_with_and_without_prefix() -> None:
    assert parse_dtype("torch.bfloat16") == parse_dtype("bfloat16") == "bfloat16"
    with pytest.raises(FormatError, match=r"unknown dtype 'torch\.torch\.int8'"):
        parse_dtype("torch.torch.int8")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(), (0, 3), (1,), (100,), (10, 10), (7, 11, 3), (4, 1000)]),
    st.sampled_from([(None, -1, 0), ("int8", -1, 0), ("int2", 0, 0), ("int3", 0, 12), ("int4", 0, 128)]),
    st.sampled_from([1, 64, 1000, 1 << 30]),
)
def test_pieces_cover_the_tensor_at_whole_groups(
    shape: tuple[int, ...], kind: tuple[str | None, int, int], limit: int
) -> None:
    quant_type, axis, size = kind
    if axis == 0 and size == 0 and not shape:
        return
    cuts = pieces(shape, "float32", *kind, limit=limit)
    group = size or (prod(shape[1:]) if axis == 0 else 1) or 1
    step = lcm(group if quant_type else 1, 8)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == prod(shape)
    assert all(stop == start for (_, stop), (start, _) in pairwise(cuts))
    assert all(start % step == 0 for start, _ in cuts)
    assert all((stop - start) * 4 <= max(limit, step * 4) for start, stop in cuts)
    if prod(shape) * 4 <= limit:
        assert len(cuts) == 1


def piece(count: int, **changes: object) -> Row:
    row = Row("big", (100,), "uint8", np.zeros(count, np.uint8), count, "none")
    return replace(row, **changes)  # pyright: ignore[reportArgumentType]


BY_TILE = replace(TILED, shape=(300, 2), num_params=512, data=np.zeros(128, np.uint8), scales=floats(*[1] * 256))
SEQUENCES = [
    ([BY_TILE], "end of the table: w still lacks 88 of 600 elements"),
    ([replace(BY_TILE, num_params=256)], "piece of 256 elements; all pieces but the last must be a multiple of 512"),
    ([RAW, GOOD, RAW], r"row 2 \(b\): the name already exists"),
    ([RAW, RAW], r"row 1 \(b\): the name already exists"),
    ([piece(48)], "end of the table: big still lacks 52 of 100 elements"),
    ([piece(48), RAW, piece(52)], r"row 1 \(b\): big still lacks 52 of 100 elements; its pieces must be adjacent"),
    ([piece(48), piece(56)], r"row 1 \(big\): piece of 56 elements, but the tensor lacks only 52"),
    ([piece(47), piece(53)], r"row 0 \(big\): piece of 47 elements; all pieces but the last must be a multiple of 8"),
    ([piece(48), piece(52, dtype="int8")], "dtype is int8, but the tensor's first piece has uint8"),
    ([piece(48), piece(52, shape=(10, 10))], r"shape is \(10, 10\), but the tensor's first piece has \(100,\)"),
    ([piece(48), piece(52), piece(48)], r"row 2 \(big\): the name already exists"),
]


@pytest.mark.parametrize(("rows", "text"), SEQUENCES, ids=[re.sub(r"\W+", " ", text)[:40] for _, text in SEQUENCES])
def test_names_and_pieces_out_of_order_are_named(rows: list[Row], text: str) -> None:
    order = RowOrder()
    with pytest.raises(FormatError, match="^t: .*" + text):  # noqa: PT012
        for position, row in enumerate(rows):
            order.add(row, "t", position)
        order.finish("t")
