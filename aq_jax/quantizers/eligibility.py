"""Decide which dtypes are weights, which tensors fit float16, and why a tensor is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp
import numpy as np

from aq_jax.config import QuantSpec
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN

_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Refused:
    """A reason why a tensor cannot be quantized."""

    why: str

    def __str__(self) -> str:
        return f'{self.why}; repair it, or keep the tensor unquantized with on_nonfinite = "keep"'


@cache
def is_floating(dtype: np.dtype) -> bool:
    """Tell whether a dtype is one of weights. E8M0, which has neither zero nor sign, holds exponents of scales."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.name != "float8_e8m0fnu"


def to_float16(array: np.ndarray) -> np.ndarray:
    """Convert to float16, unless the largest error would exceed 2^-10 of the largest value, or be undefined."""
    flat = np.ascontiguousarray(array).reshape(-1)
    half = np.empty(flat.size, np.float16)
    error = largest = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, _BLOCK):
            wide = flat[start : start + _BLOCK]
            wide = wide if wide.dtype == np.float64 else to_float32(wide)  # where small numbers would become zeros
            part = half[start : start + _BLOCK]
            part[...] = wide
            # `maximum` keeps a NaN, which then fits nothing.
            error = np.maximum(error, np.abs(part.astype(wide.dtype) - wide).max())
            largest = np.maximum(largest, np.abs(wide).max())
        fits = error <= largest * np.float32(2.0**-10)
    return half.reshape(array.shape) if fits else array


def to_float32(values: np.ndarray) -> np.ndarray:
    """Convert to float32; values that are too large become infinities."""
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore"):  # the infinity is refused by name
        return values.astype(np.float32)


def refusal(
    array: np.ndarray, spec: QuantSpec, scales: np.ndarray, name: str, sound: bool, blank: float = 1.0
) -> Refused | None:
    """Find in an array the reason why it was represented badly; None if there is none.

    Args:
        array: The weights.
        spec: The numerics of their codes.
        scales: One scale a group, clipped to [2^-126, 2^126].
        name: The tensor's name, for the text.
        sound: Whether the quantizer saw nothing wrong; it does not see numbers that are too small.
        blank: The scale of groups that looked like zeros.
    """
    if not sound and (found := not_finite(array)):
        return Refused(f"{name}: {found}")
    flat = np.ascontiguousarray(array).reshape(-1)
    size = spec.group_elements(array.shape)
    at_bounds = (scales <= SCALE_MIN) | (scales >= SCALE_MAX)
    for group in np.flatnonzero(at_bounds | (scales == blank)):
        largest = np.abs(flat[group * size : (group + 1) * size].astype(np.float64)).max(initial=0.0)
        if at_bounds[group] or 0 < largest < float(SCALE_MIN):
            return Refused(
                f"{name}: the scale of group {group}, whose largest value is {largest:.3g}, is outside [2^-126, 2^126]"
            )
    return None if sound else Refused(f"{name}: a scale is outside [2^-126, 2^126]")


def not_finite(array: np.ndarray) -> str:
    """Say how many values of an array float32 does not hold as finite numbers, and where the first is; "" if all are.

    >>> not_finite(np.array([[1, 2], [np.nan, np.inf]]))
    '2 of 4 values are not finite (first at [1, 0])'
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    bad, first = 0, -1
    for start in range(0, flat.size, _BLOCK):
        wrong = np.flatnonzero(~np.isfinite(to_float32(flat[start : start + _BLOCK])))
        if wrong.size and first < 0:
            first = start + int(wrong[0])
        bad += wrong.size
    at = [int(i) for i in np.unravel_index(first, array.shape)] if bad else []
    return f"{bad} of {flat.size} values are not finite (first at {at})" if bad else ""
