"""The rotation of `...h` rows: blocks of the input axis times a Hadamard matrix with signs.

A rotated weight is W R, where R is block-diagonal and each block is

    R[i, j] = s(i) * (-1)^popcount(i & j) / sqrt(block)          s(i) = (-1)^popcount(i & (i >> 1))

R is orthogonal, so that W = (W R) R^T and x W^T = (x R)(W R)^T. What was one outlier is spread over the block, and its
elements are nearly normally distributed, which suits evenly spaced levels (QuIP#, arXiv:2402.04396; QuaRot,
arXiv:2404.00456). The signs are the Rudin-Shapiro sequence: without them a constant block would become one outlier;
with them no element of it grows by more than sqrt(2), and no random numbers have to be stored.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float


@functools.cache
def rotation_matrix(block: int) -> Float[np.ndarray, "block block"]:
    """Make R for one block, in float32; read-only.

    >>> rotation_matrix(4) * 2
    array([[ 1.,  1.,  1.,  1.],
           [ 1., -1.,  1., -1.],
           [ 1.,  1., -1., -1.],
           [-1.,  1.,  1., -1.]], dtype=float32)
    """
    i = np.arange(block)
    exponents = np.bitwise_count(i[:, None] & i) + np.bitwise_count(i & (i >> 1))[:, None]
    matrix = (np.where(exponents % 2, -1.0, 1.0) / np.sqrt(block)).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def rotate_rows(values: Float[np.ndarray, "*lead length"], block: int) -> Float[np.ndarray, "*lead length"]:
    """Compute values R, block by block along the last axis.

    A value that is not finite spreads over its block; sums may overflow.
    """
    return _blocks_times(values, rotation_matrix(block))


def unrotate_rows(values: Float[np.ndarray, "*lead length"], block: int) -> Float[np.ndarray, "*lead length"]:
    """Compute values R^T, which undoes `rotate_rows`."""
    return _blocks_times(values, rotation_matrix(block).T)


def _blocks_times(values: Float[np.ndarray, "*lead length"], matrix: np.ndarray) -> Float[np.ndarray, "*lead length"]:
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses it by name
        return (values.reshape(-1, len(matrix)) @ matrix).reshape(values.shape)
