"""Hold what becomes of a tensor, or a piece of it, while it is quantized tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from aq_jax.codes import Code
from aq_jax.codes.bits import pack_codes
from aq_jax.config import QuantSpec


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor, or a piece of one, as the format stores it.

    Args:
        data: The bit stream of the codes, uint8.
        scales: One float32 a group.
        zero_points: One float32 a group; empty where the code has none.
        cosine: The cosine between the weights and their decoded values, in float64 from sums of tiles.
        rel_mse: The squared error divided by the squared weights.
    """

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    cosine: float
    rel_mse: float


@dataclass(slots=True, eq=False)
class Candidate:
    """One way of quantizing a range of a tensor, which grows tile by tile."""

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    sums: tuple[float, ...]  # w.w, v.v, w.v, (w - v).(w - v), v being the decoded values
    sound: bool
    codes: np.ndarray | None  # int8, where groups do not end on bytes and the stream is packed at the end
    count: int

    def add(self, ww: float, wd: float, dd: float, unit: float = 1.0) -> None:
        """Add the sums of a tile (see `tile_programs`)."""
        found = ww, ww - 2 * wd + dd, ww - wd, dd
        self.sums = tuple(old + new * unit**2 for old, new in zip(self.sums, found, strict=True))

    def finish(self, code: Code) -> Quantized:
        data = self.data
        if self.codes is not None:
            data = pack_codes(self.codes, code.bits)
        elif spare := -self.count * code.bits % 8:
            data[-1] &= 0xFF >> spare
        zero_points = self.zero_points if code.zero_points else self.zero_points[:0]
        return Quantized(data, self.scales, zero_points, *fit(*self.sums))


class TiledQuantizer:
    """The base of all ways to quantize a tensor in parts: it holds the tensor, and allocates results."""

    def __init__(self, flat: np.ndarray, size: int, spec: QuantSpec) -> None:
        self.flat, self.size, self.spec = flat, size, spec

    def candidates(self, start: int, stop: int, keep: bool) -> list[Candidate]:
        """Quantize elements `start` to `stop`, which begin with a group; codes are kept if wanted."""
        raise NotImplementedError

    def allocate(self, start: int, stop: int, keep: bool, whole_bytes: bool) -> Candidate:
        count = stop - start
        groups = -(-count // self.size)
        return Candidate(
            data=np.empty(-(-count * self.spec.bits // 8) if keep and whole_bytes else 0, np.uint8),
            scales=np.empty(groups, np.float32),
            zero_points=np.empty(groups, np.float32),
            sums=(0.0,) * 4,
            sound=True,
            codes=np.empty(count, np.int8) if keep and not whole_bytes else None,
            count=count,
        )


def fit(ww: float, vv: float, wv: float, ee: float) -> tuple[float, float]:
    """Compute the cosine of weights w and values v, and the relative squared error, from the sums of `Candidate`."""
    cosine = wv / math.sqrt(ww * vv) if ww and vv > 0 else float(ee == 0)
    return min(cosine, 1.0), ee / ww if ww else 0.0


def fit_of(sums: Iterable[float]) -> tuple[float, float]:
    """Compute the fit from w.w, w.d and d.d of weights w and errors d = w - v."""
    ww, wd, dd = map(float, sums)
    return fit(ww, ww - 2 * wd + dd, ww - wd, dd)
