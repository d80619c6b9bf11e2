"""The format's bit stream to QTensors and back: only the shape of the codes changes where rows are whole bytes."""

from __future__ import annotations

import math

import numpy as np

from aq_jax.codes.bits import pack_codes, unpack_codes
from aq_jax.codes.bits_jax import fills_bytes
from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor, check_layout, scale_shape


def from_stream(
    stream: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, shape: tuple[int, ...], spec: QuantSpec
) -> QTensor:
    """A QTensor of NumPy leaves over the format's bytes: no copy where rows are whole bytes.

    Args:
        stream: uint8, the codes of the flattened tensor.
        scale: float32, one a group; zero_point likewise.
        shape: of the tensor.
        spec: its numerics.
    """
    shape = shape or (1,)
    *lead, length = shape
    if spec.bits < 8 and fills_bytes(length, spec.bits):
        codes = stream.reshape(*lead, length * spec.bits // 8)
    else:
        codes = unpack_codes(stream, spec.bits, math.prod(shape)).reshape(shape)
    grids = scale_shape(shape, spec)
    return QTensor(codes, scale.reshape(grids), zero_point.reshape(grids), spec, length)


def to_stream(q: QTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes of a QTensor as one bit stream over the flattened tensor, and its scales and zero points, flat.

    Raises:
        ValueError: for a batch of tensors whose groups cross rows.
    """
    check_layout(q)
    codes, scale, zero_point = (np.ascontiguousarray(leaf).reshape(-1) for leaf in (q.codes, q.scale, q.zero_point))
    stream = codes.view(np.uint8) if q.packed or q.spec.bits == 8 else pack_codes(codes, q.spec.bits)
    return stream, scale, zero_point
