"""Refuse arguments that are no arrays of the kind that is wanted, or no quantized weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor


def check_weight(what: str, w: Any) -> None:
    """Refuse what is no quantized weight.

    Raises:
        TypeError: for anything else.

    >>> check_weight("qdot: W", [1.0])
    Traceback (most recent call last):
    TypeError: qdot: W is a list; wanted a QTensor, which quantize makes, or what prepare makes of one
    """
    if not isinstance(w, QTensor | Prepared):
        raise TypeError(
            f"{what} is {_described(w)}; wanted a QTensor, which quantize makes, or what prepare makes of one"
        )


def check_numbers(what: str, x: Any, *, whole: bool = False) -> None:
    """Refuse what is no array of real numbers, or of whole ones.

    Raises:
        TypeError: for anything else.

    >>> check_numbers("qembed: ids", jnp.ones(2), whole=True)
    Traceback (most recent call last):
    TypeError: qembed: ids is an array of float32; wanted an array of integers
    """
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating, jnp.bool_)
    if not _is_array(x) or not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        wanted = "integers" if whole else "real numbers"
        raise TypeError(f"{what} is {_described(x)}; wanted an array of {wanted}")


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and not isinstance(x, QTensor | Prepared)


def _described(x: Any) -> str:
    return f"an array of {x.dtype}" if _is_array(x) else f"a {type(x).__name__}"
