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


def check_texts(what: str, shape: tuple[int, ...], mask: Any, heads: int) -> None:
    """Refuse a mask that is not of bools, and heads that do not divide the width.

    Args:
        what: The operation, for messages.
        shape: The queries' [batch, tokens, width].
        mask: The keys that are seen, [batch, tokens].
        heads: The number of heads.

    Raises:
        TypeError: for a mask of anything else.
        ValueError: for one of another shape, and for such heads.

    >>> check_texts("attention", (2, 5, 6), jnp.ones((2, 5), bool), heads=4)
    Traceback (most recent call last):
    ValueError: attention: a width of 6 in 4 heads; wanted a number of heads that divides it
    """
    if not _is_array(mask) or mask.dtype != bool:
        raise TypeError(f"{what}: mask is {_described(mask)}; wanted an array of bool, True where a key is seen")
    if mask.shape != shape[:2]:
        raise ValueError(f"{what}: mask has shape {mask.shape}; wanted [batch, tokens], here {shape[:2]}")
    if heads < 1 or shape[2] % heads:
        raise ValueError(f"{what}: a width of {shape[2]} in {heads} heads; wanted a number of heads that divides it")


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and not isinstance(x, QTensor | Prepared)


def _described(x: Any) -> str:
    return f"an array of {x.dtype}" if _is_array(x) else f"a {type(x).__name__}"
