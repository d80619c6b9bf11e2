"""Measure, on a sample of a tensor's rows, how far each code moves weights, and what its grids take in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aq_jax.config import Compression
from aq_jax.core.bitstream import to_stream
from aq_jax.ops import dequantize
from aq_jax.quantizers import Calibrated
from aq_jax.quantizers.eligibility import Refused, to_float16
from aq_jax.quantizers.lookup import quantizer_of, with_fallback
from aq_jax.quantizers.tiles import quantize_array
from aq_jax.quantizers.treatment import Treatment
from aq_jax.store.container import KINDS
from aq_jax.store.schema import LARGE_COLUMNS

SAMPLE = 2**16  # elements of a tensor


@dataclass(frozen=True)
class Sampled:
    """The result of one treatment of a sample.

    Args:
        distortion: The squared error beside the squared weights.
        columns: The bytes of a table's large columns.
    """

    distortion: float
    columns: Mapping[str, bytes]


def sample_rows(weight: Float[np.ndarray, "*rows inputs"]) -> Float[np.ndarray, "rows inputs"]:
    """Take evenly spaced rows of a tensor, an even number of them if it has more than one.

    >>> sample_rows(np.zeros((3, 100, 2**13), np.float32)).shape
    (8, 8192)
    """
    rows = weight.reshape(-1, weight.shape[-1])
    count = min(max(2, SAMPLE // max(1, rows.shape[1]) // 2 * 2), len(rows))
    return np.ascontiguousarray(rows[np.arange(count) * len(rows) // max(count, 1)])


def sampled(sample: Float[np.ndarray, "rows inputs"], treatment: Treatment, name: str) -> Sampled:
    """Treat a sample of a tensor as `treatment` says; by the weights alone, if its quantizer can do so.

    Raises:
        AqError: for weights that cannot be quantized, by name.
    """
    policy, spec = treatment.policy, treatment.spec
    if spec is None:
        near = to_float16(sample).astype(np.float32) if treatment.half else sample
        return Sampled(_distortion(sample, near), {})
    alone = with_fallback(policy)
    if quantizer_of(alone).needs == "weights":
        found = quantize_array(sample, alone, name)
        if isinstance(found, Refused):  # it will be kept as it is
            return Sampled(0.0, {})
        return Sampled(found.rel_mse, _columns(found.data, found.scales, found.zero_points))
    quantizer = cast(Calibrated, quantizer_of(policy))
    white = quantizer.prepare_hessian(jnp.eye(sample.shape[1], dtype=jnp.float32), 1e-6, spec.rotation)
    q = quantizer.solve(sample, white, spec, policy.symmetric, quick=True)
    near = np.asarray(dequantize(jax.device_put(q)))
    return Sampled(_distortion(sample, near), _columns(*to_stream(q)))


def _columns(*parts: np.ndarray) -> dict[str, bytes]:
    return dict(zip(LARGE_COLUMNS, (part.tobytes() for part in parts), strict=True))


def _distortion(weight: np.ndarray, near: np.ndarray) -> float:
    square = float(np.sum(np.square(weight, dtype=np.float64)))
    return float(np.sum(np.square(near - weight, dtype=np.float64))) / square if square else 0.0


class StoredSizes:
    """The bits that tensors take in a file, whose scales and zero points compress as those of samples do.

    Args:
        samples: Treatments, and samples that were treated so; those of one quant_type count together, as a file
            compresses the rows of many tensors together.
        suffix: The kind of file, ".parquet" or ".arrow".
        compression: The compression of the file's codes.
    """

    MARGIN = 1.01  # of samples, which are not the final grids

    def __init__(
        self, samples: Sequence[tuple[Treatment, Sampled]], suffix: str, compression: Compression = "none"
    ) -> None:
        joined: dict[tuple[str, str], list[bytes]] = {}
        for treatment, found in samples:
            for column, values in found.columns.items():
                joined.setdefault((treatment.quant_type, column), []).append(values)
        self._share: dict[tuple[str, str], float] = {}
        for key, values in joined.items():
            whole = b"".join(values)
            share = KINDS[suffix].stored_bytes(key[1], whole, compression) / len(whole) if whole else 1.0
            self._share[key] = min(self.MARGIN * share, 1.0)

    def bits(self, treatment: Treatment) -> int:
        """Count the bits of a tensor."""
        columns = treatment.columns
        found = [size * self._share.get((treatment.quant_type, column), 1.0) for column, size in columns.items()]
        return 8 * math.ceil(sum(found))
