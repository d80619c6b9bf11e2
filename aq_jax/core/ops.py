"""What a model does with a quantized weight: multiply by it, and look rows up in it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Integer, Real

from aq_jax.codes import bits_jax
from aq_jax.codes.rotation_jax import rotate, unrotate
from aq_jax.core.dispatch import FEWEST_ROWS, Activations
from aq_jax.core.grid import decode, ends
from aq_jax.core.qtensor import QTensor, check_layout
from aq_jax.core.quantize import dequantize


@functools.partial(jax.jit, static_argnames="activations")
def qdot(
    x: Real[Array, "*batch inputs"], w: QTensor, activations: Activations = "float32"
) -> Float[Array, "*batch outputs"]:
    """x @ W.T for a weight stored as [outputs, inputs], as PyTorch and this format store it.

    Sums are taken in float32, or in int32 where both sides are integers; the result has x's dtype, or float32 where x
    is not floating. Derivatives are those of the float32 product, whatever x was rounded to.

    Args:
        x: real numbers, the last axis as long as W's.
        w: [outputs, inputs].
        activations: what x is rounded to before it meets W. "float32" is exact. "bfloat16" also rounds W.
            "int8" gives each row of x a scale and an offset of its own, so that a row's result depends on no other row
            (vector-wise quantization of LLM.int8(), arXiv:2208.07339, on the row's range as minmax has it), and
            multiplies it by the codes of W as integers; the relative error of a product is then about 1 %.

    Raises:
        ValueError: if W has other than two axes, or x another length; for other activations than these; for "int8" if
            the groups of W cross its rows, or a sum has over 131071 products.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qdot, quantize
    >>> w = quantize(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), "int8")
    >>> qdot(jnp.array([3.0, 4.0]), w).round(2).tolist()
    [3.0, 4.0, 7.0]
    """
    if w.ndim != 2 or x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"qdot: x of shape {list(x.shape)} and W of shape {list(w.shape)}: wanted [..., n] and [m, n]")
    if activations not in FORMULATIONS:
        raise ValueError(f"qdot: activations={activations!r}; wanted one of {', '.join(FORMULATIONS)}")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(jnp.float32)
    if w.spec.rotation:  # x W^T = (x R)(W R)^T
        rows = rotate(rows, w.spec.rotation)
        w = dataclasses.replace(w, spec=dataclasses.replace(w.spec, rotation=0))
    if w.size == 0:
        activations = "float32"  # there is nothing to round
    y = _rounded_dot(rows, w, activations).reshape(*x.shape[:-1], w.shape[0])
    return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else y


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _rounded_dot(x: Float[Array, "rows inputs"], w: QTensor, activations: Activations) -> Float[Array, "rows outputs"]:
    return FORMULATIONS[activations](x, w)


@_rounded_dot.defjvp
def _rounded_dot_jvp(activations: Activations, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Straight through the rounding of x, whose own derivative is zero."""
    return _rounded_dot(*primals, activations), jax.jvp(_float32_dot, primals, tangents)[1]


def _float32_dot(x: Float[Array, "rows inputs"], w: QTensor) -> Float[Array, "rows outputs"]:
    return jnp.dot(x, dequantize(w).T, preferred_element_type=jnp.float32)


def _bfloat16_dot(x: Float[Array, "rows inputs"], w: QTensor) -> Float[Array, "rows outputs"]:
    return jnp.dot(x.astype(jnp.bfloat16), dequantize(w, jnp.bfloat16).T, preferred_element_type=jnp.float32)


def _int8_dot(x: Float[Array, "rows inputs"], w: QTensor) -> Float[Array, "rows outputs"]:
    """Sums of integers, exact up to the scales.

    With x = sx * qx + ox for each row, and W = sw * (qw - zw) for each group, the product is the sum over groups of
    sx * sw * (qx . qw - zw * sum(qx)) + ox * sw * (sum(qw) - size * zw).
    """
    if wanted := lacks_for_integers(w):
        raise ValueError(f"qdot: integer products need {wanted}; found {w}")
    rows = x.shape[0]
    qx, sx, ox = quantize_rows(x)
    # The last row, of ones, gives sum(qw). How many rows there are is not known where a program is exported for any.
    filled = max(1, FEWEST_ROWS - rows) if isinstance(rows, int) else FEWEST_ROWS
    qx = jnp.pad(qx, ((0, filled), (0, 0)), constant_values=1)
    qw = bits_jax.unpack(w.codes, w.spec.bits) if w.packed else w.codes
    groups = w.scale.shape[-1] if w.by_row else 1
    size = w.length // groups
    scale, zero_point = (jnp.broadcast_to(a.reshape(-1, groups), (w.shape[0], groups)) for a in (w.scale, w.zero_point))

    def product(part: Any) -> Float[Array, "rows outputs"]:
        a, b = (q if groups == 1 else lax.dynamic_slice_in_dim(q, part * size, size, 1) for q in (qx, qw))
        sw, zw = (lax.dynamic_index_in_dim(grid, part, 1, keepdims=False)[None] for grid in (scale, zero_point))
        dot, sums = _integer_dot(a, b), _integer_dot(a, jnp.ones((FEWEST_ROWS, size), jnp.int8))
        # The scale of W first: x may be so large that no float32 holds its product with integers.
        return sx * (sw * (dot[:rows] - zw * sums[:rows, :1])) + ox * (sw * (dot[-1:] - size * zw))

    if groups == 1:
        return product(0)
    # A loop, so that the program does not grow with the matrix.
    return lax.fori_loop(0, groups, lambda part, y: y + product(part), jnp.zeros((rows, w.shape[0]), jnp.float32))


def quantize_rows(
    x: Float[Array, "rows inputs"],
) -> tuple[Int8[Array, "rows inputs"], Float[Array, "rows 1"], Float[Array, "rows 1"]]:
    """Codes, scale and offset, x ~ scale * codes + offset: the range of each row on 256 levels.

    The offset of a row whose range is not finite is not finite, and neither are its products.
    """
    lo, hi = ends(x)
    scale = jnp.maximum((hi - lo) * np.float32(1 / 255), np.float32(2.0**-100))
    codes = bits_jax.pack((x - lo[:, None]) * (1 / scale)[:, None] - 128, 8)
    return codes, scale[:, None], (lo + 128 * scale)[:, None]


def _integer_dot(a: Int8[Array, "rows inputs"], b: Int8[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    dot = lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return dot.astype(jnp.float32)


def lacks_for_integers(w: QTensor) -> str:
    """What W would need for integer products; nothing if they can be computed."""
    if not w.by_row and w.scale.size != 1:
        return "grids that each lie in one row of W"
    if w.length // (w.scale.shape[-1] if w.by_row else 1) > MOST_PRODUCTS:
        return f"at most {MOST_PRODUCTS} products in a sum, for 32 bits to hold it"
    return ""


# Of two int8 numbers each; a few more may not fit in int32.
MOST_PRODUCTS = 2**17 - 1
FORMULATIONS = {"float32": _float32_dot, "bfloat16": _bfloat16_dot, "int8": _int8_dot}


@jax.jit
def qembed(table: QTensor, ids: Integer[Array, "*batch"]) -> Float[Array, "*batch width"]:
    """Rows of an embedding table: gathered as codes, dequantized after.

    Args:
        table: [rows, width].
        ids: row numbers; negative ones count from the end. An id outside the table gives a row of NaN, since
            nothing can be raised in compiled code.

    Raises:
        ValueError: if the table has other than two axes, or groups that cross rows and over 2^31 elements.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qembed, quantize
    >>> qembed(quantize(jnp.eye(3), "int8"), jnp.array([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if table.ndim != 2:
        raise ValueError(f"qembed: table of shape {list(table.shape)}: wanted [rows, width]")
    check_layout(table)
    rows = table.shape[0]
    if ids.dtype.itemsize < 4:  # may not be able to count the rows
        ids = ids.astype(jnp.int32)
    elif jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.minimum(ids, rows).astype(jnp.int32)
    inside = (ids >= -rows) & (ids < rows)
    wrapped = jnp.where(inside, jnp.where(ids < 0, ids + rows, ids), rows)
    codes = jnp.take(table.codes, wrapped, axis=0, mode="clip")
    values = bits_jax.unpack_float(codes, table.spec.bits) if table.packed else codes.astype(jnp.float32)
    if table.by_row:
        scale = jnp.take(table.scale, wrapped, axis=0, mode="fill", fill_value=jnp.nan)
        zero_point = jnp.take(table.zero_point, wrapped, axis=0, mode="clip")
        grouped = values.reshape(*ids.shape, scale.shape[-1], -1)
        return _unrotated(decode(grouped, scale, zero_point).reshape(*ids.shape, table.length), table)
    if table.size >= 2**31:
        raise ValueError(
            f"qembed: a table of {table.size} elements whose groups cross rows cannot be indexed in 32 bits; "
            "choose a group_size that divides the width"
        )
    element = wrapped[..., None].astype(jnp.int32) * table.length + bits_jax.multiples(1, table.length, ids.ndim + 1)
    group = jnp.where(inside[..., None], element // table.spec.group_elements(table.shape), table.scale.size)
    scale = jnp.take(table.scale, group, mode="fill", fill_value=jnp.nan)
    return _unrotated((values - jnp.take(table.zero_point, group, mode="clip")) * scale, table)


def _unrotated(rows: Float[Array, "*batch width"], table: QTensor) -> Float[Array, "*batch width"]:
    return unrotate(rows, table.spec.rotation) if table.spec.rotation else rows
