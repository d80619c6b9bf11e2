"""Place the codes of a group: find its range, and make the grids that follow from the range alone.

The functions of a grid follow the array they are given: NumPy arrays are computed by NumPy, JAX arrays by JAX.

A jitted `quantize` by `absmax` or `minmax` reads its input twice: `min_max` finds the ranges in one reduction, a second
loop scales, rounds, clips and packs. XLA's CPU compiler makes vector code of both: on 4096 x 4096 weights, one AVX2
core that copies 8 to 9 GB/s took 6.0 ms for the ranges and 5.8 (int4, int8) to 6.4 ms (int2) for the codes. Slower
there: minimum and maximum as two reductions (5.9 instead of 11.5 GB/s); reductions of `where(isfinite(w), w, ...)` or
`abs(w)`, which are not vectorized (0.5 to 1.1 GB/s); packing by multiplication with powers of two, or in 8- or 16-bit
lanes (by 5 % to ten times). No faster: `lax.map` over 8 to 256 blocks that stay in the cache (0.93 to 1.12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from aq_jax.codes import Code, Grid
from aq_jax.codes.affine import code_range
from aq_jax.codes.entry import Rounding

# One NumPy array in, one NumPy array out, and the same for JAX: more than a type checker can be told.
if TYPE_CHECKING:
    AnyArray: TypeAlias = Any
else:
    AnyArray = Array | np.ndarray
SCALE_MIN, SCALE_MAX = np.float32(2.0**-126), np.float32(2.0**126)
_FLOAT_MAX = np.finfo(np.float32).max


def min_max(x: Float[Array, "*groups size"]) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"]]:
    """Find the smallest and largest element of each group in one reduction, which reads memory once.

    Both are NaN if any element is.
    """
    return lax.reduce(
        (x, x),
        (np.float32(np.inf), np.float32(-np.inf)),
        lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
        (x.ndim - 1,),
    )


def finite_range(
    w: Float[Array, "*groups size"],
) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"], Bool[Array, ""]]:
    """Find the smallest and largest finite element of each group, and whether all elements of all groups are finite.

    A group without a finite element has the range (0, 0). The plain reductions are several times faster than the masked
    ones, which run only when something is not finite.
    """
    lo, hi = min_max(w)
    finite = jnp.isfinite(jnp.min(lo)) & jnp.isfinite(jnp.max(hi))

    def masked(w: Array, lo: Array, hi: Array) -> tuple[Array, Array]:
        ok = jnp.isfinite(w)
        lo = jnp.min(jnp.where(ok, w, jnp.inf), axis=-1)
        hi = jnp.max(jnp.where(ok, w, -jnp.inf), axis=-1)
        none = lo > hi
        return jnp.where(none, 0.0, lo), jnp.where(none, 0.0, hi)

    lo, hi = lax.cond(finite, lambda w, lo, hi: (lo, hi), masked, w, lo, hi)
    return lo, hi, finite


def absmax_grid(lo: Float[AnyArray, "*groups"], hi: Float[AnyArray, "*groups"], code: Code) -> Grid:
    """Make the symmetric grid: scale = max|x| * f32(1/qmax), zero_point = 0 (the published recipe).

    qmax is the outermost level.
    """
    xp = lo.__array_namespace__()
    scale = xp.maximum(hi, -lo) * np.float32(1 / code.max_level)
    return fix_degenerate(scale, xp.zeros_like(scale), xp.zeros_like(scale), lo, hi, code, "mid_tread")


def minmax_grid(lo: Float[AnyArray, "*groups"], hi: Float[AnyArray, "*groups"], code: Code) -> Grid:
    """Make the asymmetric grid: scale = max * f32(1/n) - min * f32(1/n), zero_point = qmin - min * (1/scale).

    The zero point is a float.
    """
    xp = lo.__array_namespace__()
    qmin, qmax = code_range(code.bits)
    share = np.float32(1 / (qmax - qmin))
    scale = _product(hi, share) - _product(lo, share)
    safe = xp.clip(scale, SCALE_MIN, SCALE_MAX)
    zero_point = qmin - _product(lo, 1 / safe)
    return fix_degenerate(scale, zero_point, lo, lo, hi, code, "affine")


def fix_degenerate(scale: Any, zero_point: Any, base: Any, lo: Any, hi: Any, code: Code, rounding: Rounding) -> Grid:
    """Make constant groups exact and force every scale into its bounds.

    A group of one value c gets scale = |c| (2|c| for `mid_rise`) and a zero point under which a code is c exactly: -1
    and 1 are levels of every code. A group whose range is too narrow, beside its values, for a float32 scale counts as
    constant.
    """
    xp = lo.__array_namespace__()
    qmin, _ = code_range(code.bits)
    # Below 2^-102 the range itself may be flushed to zero: there only equal values are constant.
    narrow = (hi - lo <= xp.abs(hi) * np.float32(2.0**-20)) & (xp.abs(hi) >= np.float32(2.0**-102))
    constant = (lo == hi) | ((scale == 0) & narrow)
    zero = constant & (hi == 0)
    exact = xp.where(zero, np.float32(1), xp.abs(hi))
    if rounding == "mid_rise":
        exact = xp.where(zero, np.float32(1), 2 * exact)
        zero_point = xp.where(zero, np.float32(0), np.float32(-0.5))
    else:
        zero_point = xp.where(constant, np.float32(0), zero_point)
    base = xp.where(constant, qmin * exact, base)
    scale = xp.where(constant, exact, scale)
    sound = (scale >= SCALE_MIN) & (scale <= SCALE_MAX)
    if rounding == "affine":  # the differences that `encode` takes must not overflow
        sound = sound & xp.isfinite(hi - lo) & xp.isfinite(base)
    return Grid(xp.clip(scale, SCALE_MIN, SCALE_MAX), zero_point, base, sound, rounding)


def round_mantissa(x: Float[AnyArray, "*shape"], bits: int) -> Float[AnyArray, "*shape"]:
    """Round to `bits` stored mantissa bits, ties to even: 7 gives two-byte floats, 0 powers of two."""
    if isinstance(x, jax.Array):
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)
    drop = np.uint32(23 - bits)
    raw = np.asarray(x, np.float32).view(np.uint32)
    odd = (raw >> drop) & np.uint32(1)
    kept = (raw + (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1) + odd) >> drop
    return (kept << drop).view(np.float32)


def _product(a: Any, b: Any) -> Any:
    """Multiply so that no later addition is fused with it: no compiler looks through the saturation."""
    return (a * b).clip(-_FLOAT_MAX, _FLOAT_MAX)
