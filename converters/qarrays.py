"""Turn QTensors into Qwix's QArrays, for those who serve through it, and back. Qwix is imported when one is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aq_jax.codes.bits import pack_codes, unpack_codes
from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream, to_stream
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError, ConfigError

Layout = Literal["out_in", "in_out"]
# The logical types of Qwix -> the bits of codes.
_BITS = {"int8": 8, "int4": 4, "int2": 2}


def to_qarray(q: QTensor, layout: Layout = "out_in") -> Any:
    """Make a QArray of a QTensor; values are equal.

    Args:
        q: A QTensor of evenly spaced levels that is not rotated, each row of which has its own groups.
        layout: "in_out" gives the transposed QArray, as Flax kernels are and as Qwix's rules name axes.

    Raises:
        ConfigError: for another layout; without Qwix.
        AqError: for levels, groups or zero points that a QArray does not have: its zero points are small integers.
    """
    _check_layout(layout)
    try:
        from qwix import QArray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("to_qarray: needs Qwix; try: pip install qwix") from None
    parts = {part: None if leaf is None else np.asarray(leaf) for part, leaf in _leaves(q).items()}
    host = dataclasses.replace(q, **parts)
    code = q.spec.coding
    scale, zeros, minimum = code.float_grids(host.scale, host.zero_point) if code.integral else (None, None, None)
    if scale is None or minimum is not None or code.matrices or q.spec.rotation or not host.by_row:
        raise AqError(f"{q!r}: has no QArray; wanted evenly spaced levels, not rotated, and whole groups in each row")
    codes = unpack_codes(to_stream(host)[0], q.spec.bits, math.prod(q.shape)).reshape(q.shape)
    zeros = np.zeros_like(scale) if zeros is None else zeros
    kind = f"int{q.spec.bits}"
    if (2 * zeros % 2).any() and q.spec.bits < 8:  # half a level: twice as many levels, of half the size
        codes, scale, zeros, kind = 2 * codes, scale / 2, 2 * zeros, "int8"
    if (zeros % 1).any() or np.abs(zeros).max(initial=0) > 127:
        raise AqError(
            f"{q!r}: has zero points that are no small integers, as those of a QArray are; quantize symmetric"
        )
    qvalue, scale = jnp.asarray(codes.astype(np.int8)), jnp.asarray(scale)
    zero_point = jnp.asarray(zeros.astype(np.int8)) if zeros.any() else None
    found = QArray(qvalue, scale, zero_point, jnp.dtype(kind if kind in _BITS else "int8"))
    return found if layout == "out_in" else jax.tree.map(lambda leaf: leaf.swapaxes(-1, -2), found)


def from_qarray(array: Any, layout: Layout = "out_in") -> QTensor:
    """Make a QTensor of a QArray; values are equal, but for the rounding of scales that are no float32.

    Args:
        array: A QArray of two axes or more, of int8, int4 or int2, whose tiles are parts of rows.
        layout: The order of its last two axes; the QTensor is [out, in].

    Raises:
        ConfigError: for another layout.
        AqError: for what is no QArray, for another type, and for scales that several rows share in part.
    """
    _check_layout(layout)
    if not all(hasattr(array, part) for part in ("qvalue", "scale", "zero_point", "qtype")):
        raise AqError(f"from_qarray: got {type(array).__name__}; wanted a QArray, as to_qarray and Qwix make them")
    kind = jnp.dtype(array.qtype).name
    if kind not in _BITS or array.qvalue.ndim < 2:
        raise AqError(f"a QArray of {kind} {list(array.qvalue.shape)}: wanted int8, int4 or int2, of two axes or more")
    leaves = (array.qvalue, array.scale, array.zero_point)
    codes, scale, zeros = (np.zeros((1,) * array.qvalue.ndim) if leaf is None else np.asarray(leaf) for leaf in leaves)
    if layout == "in_out":
        codes, scale, zeros = (leaf.swapaxes(-1, -2) for leaf in (codes, scale, zeros))
    shape, bits = codes.shape, _BITS[kind]
    groups = max(scale.shape[-1], zeros.shape[-1])
    scale, zeros = (_per_row(grid, (*shape[:-1], groups)) for grid in (scale, zeros))
    per_channel = groups == 1 and len(shape) == 2
    spec = QuantSpec(bits, per_channel, 0 if per_channel else shape[-1] // groups)
    stream = pack_codes(codes.astype(np.int8), bits)
    return jax.device_put(from_stream(stream, scale.reshape(-1), zeros.reshape(-1), shape, spec))


def _per_row(grid: np.ndarray, wanted: tuple[int, ...]) -> np.ndarray:
    """Repeat scales, one of each group of each row."""
    for axis, (found, count) in enumerate(zip(grid.shape, wanted, strict=True)):
        if count % found or (axis < grid.ndim - 1 and found not in (1, count)):
            raise AqError(f"a QArray with scales {list(grid.shape)}: wanted parts of rows, {list(wanted)}")
        grid = np.repeat(grid, count // found, axis)
    return grid.astype(np.float32)


def _leaves(q: QTensor) -> dict[str, Any]:
    return {"codes": q.codes, "scale": q.scale, "zero_point": q.zero_point}


def _check_layout(layout: str) -> None:
    if layout not in ("out_in", "in_out"):
        raise ConfigError(f"layout = {layout!r}: wanted out_in or in_out")
