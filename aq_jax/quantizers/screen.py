"""Which dtypes are weights, what float16 can hold, and why a tensor is refused."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from aq_jax.config import QuantSpec
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN

_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a tensor cannot be quantized."""

    why: str

    def __str__(self) -> str:
        return f'{self.why}; repair it, or keep the tensor unquantized with on_nonfinite = "keep"'


def is_floating(dtype: np.dtype) -> bool:
    """Whether a dtype is one of weights. E8M0, which has neither zero nor sign, holds the exponents of other scales."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.name != "float8_e8m0fnu"


def to_half(array: np.ndarray) -> np.ndarray:
    """In float16, or unchanged where float16's largest error exceeds 2^-10 of the largest value (or is undefined)."""
    flat = np.ascontiguousarray(array).reshape(-1)
    half = np.empty(flat.size, np.float16)
    error = largest = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, _BLOCK):
            wide = flat[start : start + _BLOCK]
            wide = wide if wide.dtype == np.float64 else float32(wide)  # to which small numbers would be zeros
            part = half[start : start + _BLOCK]
            part[...] = wide
            # `maximum` keeps a NaN, which then fits nothing.
            error = np.maximum(error, np.abs(part.astype(wide.dtype) - wide).max())
            largest = np.maximum(largest, np.abs(wide).max())
        fits = error <= largest * np.float32(2.0**-10)
    return half.reshape(array.shape) if fits else array


def float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float32:
        return values
    with np.errstate(over="ignore"):  # an overflow is an infinity, which is refused by name
        return values.astype(np.float32)


def refusal(array: np.ndarray, spec: QuantSpec, scales: np.ndarray, name: str, sound: bool) -> Refused | None:
    """Why an array was not represented well, found in the array itself; None if there is no reason.

    Args:
        array: the weights.
        spec: their numerics.
        scales: one a group, forced into [2^-126, 2^126]; 1 where a group was taken for zeros.
        name: for the text.
        sound: whether the quantizer saw nothing wrong; numbers that are too small for it to see may still be there.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    bad, first = 0, -1
    for start in range(0, 0 if sound else flat.size, _BLOCK):
        wrong = np.flatnonzero(~np.isfinite(float32(flat[start : start + _BLOCK])))
        if wrong.size and first < 0:
            first = start + int(wrong[0])
        bad += wrong.size
    if bad:
        at = [int(i) for i in np.unravel_index(first, array.shape)]
        return Refused(f"{name}: {bad} of {flat.size} values are not finite (first at {at})")
    size = spec.group_elements(array.shape)
    at_bounds = (scales <= SCALE_MIN) | (scales >= SCALE_MAX)
    for group in np.flatnonzero(at_bounds | (scales == 1)):
        largest = np.abs(flat[group * size : (group + 1) * size].astype(np.float64)).max(initial=0.0)
        if at_bounds[group] or 0 < largest < float(SCALE_MIN):
            return Refused(
                f"{name}: the scale of group {group}, whose largest value is {largest:.3g}, is outside [2^-126, 2^126]"
            )
    return None if sound else Refused(f"{name}: a scale is outside [2^-126, 2^126]")
