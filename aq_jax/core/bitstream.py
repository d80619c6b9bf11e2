"""What the table holds of a tensor to QTensors and back: only the shape of codes changes where rows are whole bytes."""

from __future__ import annotations

import numpy as np

from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor, check_layout, scale_shape


def from_stream(
    stream: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, shape: tuple[int, ...], spec: QuantSpec
) -> QTensor:
    """A QTensor of NumPy leaves over the format's bytes: no copy where rows are whole bytes.

    Args:
        stream: uint8, the codes of the flattened tensor.
        scale: float32, one a group; zero_point likewise, empty where the code has none.
        shape: of the tensor.
        spec: its numerics.
    """
    shape, code = shape or (1,), spec.coding
    grids = scale_shape(shape, spec)
    zeros = zero_point.reshape(grids) if code.zero_points else None
    return QTensor(code.lay(stream, shape), scale.reshape(grids), zeros, spec, shape[-1], code.rows(shape))


def to_stream(q: QTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes of a QTensor as one bit stream over the flattened tensor, and its scales and zero points, flat.

    Raises:
        ValueError: for a batch of tensors whose groups cross rows.
    """
    check_layout(q)
    nothing = np.empty(0, np.float32)
    scale, zeros = (nothing if leaf is None else np.ascontiguousarray(leaf) for leaf in (q.scale, q.zero_point))
    return q.spec.coding.flat(np.asarray(q.codes), q.shape).view(np.uint8), scale.reshape(-1), zeros.reshape(-1)
