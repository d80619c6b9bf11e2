"""Train the scales of weights whose codes stay as calibration chose them, such as trellis codes.

A code that depends on its neighbours has no gradient of its own, and no small step leads to another one. But a weight
is its level times the scale of its row, whether it is rotated or not, for a rotation turns each row by itself: of that,
the logarithm of the scale is trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aq_jax.calibration.latent import stored_scale
from aq_jax.codes import Code
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError
from aq_jax.ops import dequantize


def is_trainable(code: Code) -> bool:
    """Tell whether training takes a code: its levels are evenly spaced, or each row of a matrix has one scale."""
    return code.uniform or code.matrices


def check_trainable(code: Code, where: str) -> None:
    """Refuse a code that training does not take.

    Raises:
        ConfigError: naming `where` and the code.
    """
    if not is_trainable(code):
        raise ConfigError(
            f"{where}: training needs evenly spaced levels, or one scale a row, which {code.plain_name} does not have; "
            "choose another quant_type, or leave [train] out"
        )


def unit_values(q: QTensor) -> Float[Array, "rows inputs"]:
    """Decode a matrix as if each of its scales were 1; a rotation is undone.

    >>> from aq_jax import quantize
    >>> q = quantize(jax.random.normal(jax.random.key(0), (4, 8)), "tcq3")
    >>> bool((unit_values(q) * q.scale == dequantize(q)).all())
    True
    """
    return dequantize(dataclasses.replace(jax.device_put(q), scale=jnp.ones_like(q.scale)))


@jax.jit
def with_scales(q: QTensor, log_scale: Float[Array, "rows 1"]) -> QTensor:
    """Give a matrix other scales, as training computes with them and tables store them."""
    return dataclasses.replace(q, scale=stored_scale(log_scale))
