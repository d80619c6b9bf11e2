"""Choose trellis codes of whole matrices, with the native library or else in XLA (`trellis_xla`).

A tile of 256 rows is one path through the states of its code, column by column. It is found in windows of a column's
length by Viterbi's algorithm, and what errors weigh is that of the matrix's Hessian, if there is one: then the errors
of a column are made up for by the columns that follow, as GPTQ does. Rounds of refinement follow, each of which fits
the scales by least squares, and finds each window again, given all others.

A tile's codes depend on its weights and Hessian alone, on no number of threads, and on the processor as far as its sums
do.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aq_jax import native
from aq_jax.codes.rotation import rotate_rows
from aq_jax.codes.trellis import Trellis
from aq_jax.codes.trellis_numpy import level_table
from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream
from aq_jax.core.qtensor import QTensor
from aq_jax.native import host
from aq_jax.quantizers import trellis_xla
from aq_jax.quantizers.hessian import PreparedHessian

ROUNDS = 2
NO_SCALE = trellis_xla.NO_SCALE
# The first scale of a row, as a part of the root of its mean square: those of the least error on normally distributed
# weights, each divided by the levels' root of the mean square, 37.15.
STARTS = {(5, 1): 1.19, (4, 1): 1.15, (3, 1): 1.09, (2, 1): 1.03, (3, 2): 0.98}
LEVEL_SIZE = 37.15


class Encoded(NamedTuple):
    """Codes of matrices, and their errors.

    Args:
        data: The codes as the format stores them, uint8.
        scales: One float32 a row.
        sums: w.w, w.d and d.d over all elements, d being the error, in float64.
        sound: Whether all elements are finite and all scales within bounds.
    """

    data: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    sound: bool


def encoder() -> str:
    """Name what encodes here: the native library's instruction set, or else XLA's platform."""
    return native.probe().isa if host.encodes_trellis() else f"xla {jax.default_backend()}"


def encode_matrices(
    w: Float[np.ndarray, "*lead rows columns"],
    code: Trellis,
    hessian: tuple[np.ndarray, np.ndarray] | None = None,
    rounds: int = ROUNDS,
) -> Encoded:
    """Choose the codes of matrices, one after the other.

    Args:
        w: The weights, rotated already if they are to be.
        code: The code.
        hessian: What the inputs of a matrix weigh, and the factor u of its inverse, u^T u, an upper triangle.
        rounds: The rounds of refinement.
    """
    *_, rows, columns = w.shape
    matrices = np.ascontiguousarray(w, np.float32).reshape(-1, rows, columns)
    encode = _encode_natively if host.encodes_trellis() else _encode_by_xla
    found = [encode(each, code, hessian, rounds) for each in matrices]
    data, scales, sums, sound = zip(*found, strict=True)
    return Encoded(np.concatenate(data), np.concatenate(scales), np.sum(sums, axis=0), all(sound))


def first_scale(code: Trellis) -> float:
    """Return the first scale of a row whose root of the mean square is 1."""
    return STARTS[code.step_bits, code.step_rows] / LEVEL_SIZE


def _encode_natively(
    w: np.ndarray,
    code: Trellis,
    hessian: tuple[np.ndarray, np.ndarray] | None,
    rounds: int,
) -> Encoded:
    data, scales = np.empty(code.matrix_bytes(*w.shape), np.uint8), np.empty(len(w), np.float32)
    levels = np.ascontiguousarray(level_table(code.step_rows).T)
    sums, sound = host.encode_trellis(w, code.step_bits, levels, hessian, first_scale(code), rounds, data, scales)
    return Encoded(data, scales, sums, sound)


def _encode_by_xla(
    w: np.ndarray,
    code: Trellis,
    hessian: tuple[np.ndarray, np.ndarray] | None,
    rounds: int,
) -> Encoded:
    found = trellis_xla.encode(jnp.asarray(w), hessian, first_scale(code), code, rounds)
    data, scales, sound = jax.device_get(found)
    values = np.empty_like(w)
    code.read(data, scales, scales[:0], w.shape[1], w.shape, values)
    wide = np.where(np.isfinite(w), w, 0).astype(np.float64)
    d = wide - values
    return Encoded(data, scales, np.array([np.sum(wide * wide), np.sum(wide * d), np.sum(d * d)]), bool(sound))


def solve_matrix(
    w: Float[np.ndarray, "rows columns"],
    hessian: PreparedHessian,
    spec: QuantSpec,
    rounds: int = ROUNDS,
) -> QTensor:
    """Quantize a weight so that its outputs change least under a Hessian; return a QTensor of NumPy leaves.

    >>> from aq_jax.quantizers.hessian import prepare_hessian
    >>> w = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    >>> solve_matrix(w, prepare_hessian(np.eye(8, dtype=np.float32)), QuantSpec(3, True, code="tcq3"))
    QTensor(tcq3[16, 8], QuantSpec(bits=3, per_channel=True, group_size=0, rotation=0, code='tcq3'))
    """
    code = spec.coding
    assert isinstance(code, Trellis)  # noqa: S101
    w = rotate_rows(w, spec.rotation) if spec.rotation else w
    w = np.where(np.isfinite(w), w, np.float32(0))
    h, u = (np.ascontiguousarray(each) for each in jax.device_get((hessian.h, _factor(hessian.h))))
    found = encode_matrices(w, code, (h, u), rounds)
    return from_stream(found.data, found.scales, found.scales[:0], w.shape, spec)


@jax.jit
def _factor(h: Float[Array, "inputs inputs"]) -> Float[Array, "inputs inputs"]:
    """Compute the upper triangle u of h^-1 = u^T u, in the order of the inputs; see `hessian.prepare_hessian`."""
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    u = jax.scipy.linalg.solve_triangular(r, jnp.eye(len(h), dtype=jnp.float32))
    # A factor that float32 does not have: columns are chosen each for itself.
    return jnp.where(jnp.isfinite(u).all(), u, jnp.diag(1 / jnp.sqrt(jnp.diagonal(h))))
