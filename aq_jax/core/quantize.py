"""Assemble QTensors from codes on known grids."""

from __future__ import annotations

from jaxtyping import Array, Float

from aq_jax.codes import bits_jax
from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor, from_groups


def assemble_qtensor(
    codes: Float[Array, "*groups size"],
    scale: Float[Array, "*groups"],
    zero_point: Float[Array, "*groups"] | None,
    shape: tuple[int, ...],
    spec: QuantSpec,
) -> QTensor:
    """Make a QTensor from codes in groups: restore the tensor's shape, then pack (see `bits_jax.pack`).

    Args:
        codes: One code an element.
        scale: The scale of each group.
        zero_point: The zero point of each group; dropped where the code has none.
        shape: The tensor's shape.
        spec: The tensor's numerics.
    """
    codes = from_groups(codes, shape)
    packed = spec.coding.codes_like(shape)[1] == "uint8"
    zeros = zero_point if spec.coding.zero_points else None
    return QTensor(bits_jax.pack(codes, spec.bits if packed else 8), scale, zeros, spec, shape[-1])
