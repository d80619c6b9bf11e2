"""Quantize groups by the native library: nothing is compiled, and no tile is filled up."""

from __future__ import annotations

import numpy as np

from aq_jax.codes.runs import fills_bytes
from aq_jax.config import QuantSpec
from aq_jax.native import host
from aq_jax.native.host import Recipe
from aq_jax.quantizers.candidates import Candidate, TiledQuantizer
from aq_jax.quantizers.eligibility import to_float32
from aq_jax.store import DTYPES

NATIVE_TILE, MOST_GROUPS = 1 << 21, 1 << 16
"""The elements and the groups that the native library quantizes in one call."""


class NativeGroups(TiledQuantizer):
    """Groups, and channels, that the native library quantizes, many at a time."""

    def __init__(self, flat: np.ndarray, size: int, spec: QuantSpec, recipes: tuple[Recipe, ...]) -> None:
        super().__init__(flat, size, spec)
        self.recipes = recipes

    def candidates(self, start: int, stop: int, keep: bool) -> list[Candidate]:
        bits, whole = self.spec.bits, fills_bytes(self.size, self.spec.bits) or self.size >= stop - start
        found = [self.allocate(start, stop, keep, whole) for _ in self.recipes]
        # A multiple of 8 groups ends on a byte.
        step = max(1, min(NATIVE_TILE // self.size, MOST_GROUPS) // 8) * 8 * self.size
        codes = np.empty(0 if keep else min(step, stop - start), np.int8)
        known = self.flat.dtype in (DTYPES["float32"], DTYPES["bfloat16"])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            w = self.flat[first:last] if known else to_float32(self.flat[first:last])
            groups = slice((first - start) // self.size, -(-(last - start) // self.size))
            for recipe, each in zip(self.recipes, found, strict=True):
                if not keep:
                    to = codes[: w.size]
                elif each.codes is not None:
                    to = each.codes[first - start : last - start]
                else:
                    to = each.data[(first - start) * bits // 8 : -(-(last - start) * bits // 8)]
                sums, sound = host.quantize(
                    w, self.size, bits, recipe, to, each.scales[groups], each.zero_points[groups]
                )
                each.add(*sums)
                each.sound &= sound
        return found
