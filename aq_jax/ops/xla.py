"""XLA's kernels: every backend has them, and other kernels are compared with them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Int8

from aq_jax.codes import Code, Grid, bits_jax
from aq_jax.core.dispatch import MIN_ROWS, Activations
from aq_jax.core.grid import min_max
from aq_jax.core.qtensor import QTensor, check_layout
from aq_jax.ops.epilogue import Epilogue


@dataclass(frozen=True)
class Product:
    """x @ W.T: of floats with the dequantized weight, of integers with its codes."""

    def refuses(self, w: QTensor, activations: Activations) -> str:
        return ""

    def run(
        self, x: Float[Array, "rows inputs"], w: QTensor, activations: Activations, after: Epilogue
    ) -> Float[Array, "rows outputs"]:
        return after.apply({"float32": float32_dot, "bfloat16": _bfloat16_dot, "int8": _int8_dot}[activations](x, w))


@dataclass(frozen=True)
class Rows:
    """Rows of a table: their codes are gathered, then dequantized."""

    def refuses(self, table: QTensor) -> str:
        if table.by_row or table.size < 2**31:
            return ""
        return (
            f"a table of {table.size} elements whose groups cross rows cannot be indexed in 32 bits; choose a "
            "group_size that divides the width"
        )

    def run(
        self, table: QTensor, ids: Int[Array, "*batch"], inside: Bool[Array, "*batch"]
    ) -> Float[Array, "*batch width"]:
        return table.spec.coding.take(table, ids, inside)


@dataclass(frozen=True)
class Quantize:
    """Codes of groups on their grids; packing does the last rounding (see `Code.encode_unrounded`)."""

    def refuses(self, size: int, code: Code) -> str:
        return ""

    def run(self, w: Float[Array, "*groups size"], grid: Grid, code: Code) -> Float[Array, "*groups size"]:
        return code.encode_unrounded(w, grid)


@dataclass(frozen=True)
class Dequantize:
    """Values of codes."""

    def refuses(self, w: QTensor) -> str:
        return ""

    def run(self, w: QTensor, dtype: DTypeLike) -> Float[Array, "*shape"]:
        return decode_qtensor(w, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def decode_qtensor(w: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """Decode a QTensor in float32, a rotation left in it, and round the values to `dtype`."""
    if w.size:
        check_layout(w)
    return saturated(w.spec.coding.values(w), dtype)


def saturated(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Round to a dtype, and finite numbers beyond its largest to that: levels lie a little further out than weights."""
    most = float(jnp.finfo(dtype).max)
    return (jnp.clip(x, -most, most) if most < float(jnp.finfo(x.dtype).max) else x).astype(dtype)


def float32_dot(x: Float[Array, "rows inputs"], w: QTensor) -> Float[Array, "rows outputs"]:
    """Multiply float32 inputs by the dequantized weight."""
    return jnp.dot(x, decode_qtensor(w).T, preferred_element_type=jnp.float32)


def _bfloat16_dot(x: Float[Array, "rows inputs"], w: QTensor) -> Float[Array, "rows outputs"]:
    return jnp.dot(x.astype(jnp.bfloat16), decode_qtensor(w, jnp.bfloat16).T, preferred_element_type=jnp.float32)


def _int8_dot(x: Float[Array, "rows inputs"], w: QTensor) -> Float[Array, "rows outputs"]:
    """Multiply by integer levels; sums are exact up to the scales.

    With x = sx * qx + ox for each row, and W = sw * (qw - zw) + mw for each group, the product is the sum over groups
    of sx * (sw * (qx . qw - zw * sum(qx)) + mw * sum(qx)) + ox * (sw * (sum(qw) - size * zw) + mw * size).
    """
    rows = x.shape[0]
    qx, sx, ox = quantize_rows(x)
    # The last row, of ones, gives sum(qw). A program that is exported for any number of rows does not know it.
    filled = max(1, MIN_ROWS - rows) if isinstance(rows, int) else MIN_ROWS
    qx = jnp.pad(qx, ((0, filled), (0, 0)), constant_values=1)
    qw = w.spec.coding.levels(w)
    groups = w.row_groups if w.by_row else 1
    size = w.length // groups
    grids = [
        None if grid is None else jnp.broadcast_to(grid.reshape(-1, groups), (w.shape[0], groups))
        for grid in w.spec.coding.float_grids(w.scale, w.zero_point)
    ]

    def of_part(grid: Any, part: Any) -> Any:
        return None if grid is None else lax.dynamic_index_in_dim(grid, part, 1, keepdims=False)[None]

    def product(part: Any) -> Float[Array, "rows outputs"]:
        a, b = (q if groups == 1 else lax.dynamic_slice_in_dim(q, part * size, size, 1) for q in (qx, qw))
        sw, zw, mw = (of_part(grid, part) for grid in grids)
        dot, sums = _integer_dot(a, b), _integer_dot(a, jnp.ones((MIN_ROWS, size), jnp.int8))
        # The scale of W first: x may be so large that no float32 holds its product with integers.
        ours, whole, count = dot[:rows], dot[-1:], sums[:rows, :1]
        if zw is not None:
            ours, whole = ours - zw * count, whole - size * zw
        ours, whole = sw * ours, sw * whole
        if mw is not None:
            ours, whole = ours + mw * count, whole + size * mw
        return sx * ours + ox * whole

    if groups == 1:
        return product(0)
    # A loop, so that the program does not grow with the matrix.
    return lax.fori_loop(0, groups, lambda part, y: y + product(part), jnp.zeros((rows, w.shape[0]), jnp.float32))


def quantize_rows(
    x: Float[Array, "rows inputs"],
) -> tuple[Int8[Array, "rows inputs"], Float[Array, "rows 1"], Float[Array, "rows 1"]]:
    """Quantize each row's range to 256 levels: codes, scale and offset, x ~ scale * codes + offset.

    A row whose range is not finite has no finite offset, and no finite products.
    """
    lo, hi = min_max(x)
    scale = jnp.maximum((hi - lo) * np.float32(1 / 255), np.float32(2.0**-100))
    codes = bits_jax.pack((x - lo[:, None]) * (1 / scale)[:, None] - 128, 8)
    return codes, scale[:, None], (lo + 128 * scale)[:, None]


def _integer_dot(a: Int8[Array, "rows inputs"], b: Int8[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    dot = lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return dot.astype(jnp.float32)
