"""Turn a table's bytes into QTensors and back: where rows are whole bytes, only the shape of the codes changes."""

from __future__ import annotations

import numpy as np

from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor, check_layout, scale_shape, zero_shape
from aq_jax.store import DTYPES


def from_stream(
    stream: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, shape: tuple[int, ...], spec: QuantSpec
) -> QTensor:
    """Make a QTensor of NumPy leaves over the format's bytes, without a copy where rows are whole bytes.

    Args:
        stream: The codes of the flattened tensor, as uint8.
        scale: The table's column: one float32 a group, unless the code has other grids.
        zero_point: The table's column, of the code's `zero_dtype`; empty where the code has none.
        shape: The tensor's shape.
        spec: The tensor's numerics.
    """
    shape, code = shape or (1,), spec.coding
    zeros = zero_point.reshape(zero_shape(shape, spec)) if code.zero_points else None
    scale = scale.reshape(scale_shape(shape, spec))
    return QTensor(code.from_stream(stream, shape), scale, zeros, spec, shape[-1], code.rows(shape))


def to_stream(q: QTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay the codes of a QTensor out as one bit stream over the flattened tensor; flatten its scales and zero points.

    Raises:
        ValueError: for a batch of tensors whose groups cross rows.
    """
    check_layout(q)
    nothing = np.empty(0, DTYPES[q.spec.coding.zero_dtype])
    scale, zeros = (nothing if leaf is None else np.ascontiguousarray(leaf) for leaf in (q.scale, q.zero_point))
    return q.spec.coding.to_stream(np.asarray(q.codes), q.shape).view(np.uint8), scale.reshape(-1), zeros.reshape(-1)
