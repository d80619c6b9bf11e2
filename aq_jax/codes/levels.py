"""A table of levels: code c stands for level c of a list, times the scale of its group.

nf4         bitsandbytes' NormalFloat: sixteen quantiles of the normal distribution
fp4         bitsandbytes' float of four bits: a sign, two bits of exponent and one of mantissa
f8_e4m3     float8_e4m3fn, the bytes themselves; with halves as scales: f8_e4m3_f16, f8_e4m3_bf16
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from aq_jax.codes.elementwise import Elementwise
from aq_jax.codes.entry import Grid

# The float32 numbers that bitsandbytes multiplies by.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*_FP4, 0.0, *(-level for level in _FP4[1:]))


def e4m3_levels() -> tuple[float, ...]:
    """List what the bytes -128, ..., 127 of float8_e4m3fn stand for."""
    small = [mantissa * 2.0**-9 for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    positive = [*small, *normal[:-1], float("nan")]
    return (*(-level for level in positive), *positive)


@dataclass(frozen=True)
class Levels(Elementwise):
    """Codes that number the levels of a table, which reach from -max_level to max_level.

    Args:
        name: The format's quant_type.
        bits: The bits of a code.
        table: The level of each code, the lowest code first. NaN is never chosen.
        grid_dtype: The dtype of scales. No quantizer here chooses halves.

    >>> import numpy as np
    >>> code = Levels("nf4", 4, NF4)
    >>> code.decode(np.float32([[-8, -1, 7]]), np.float32([2]), None)
    array([[-2.,  0.,  2.]], dtype=float32)
    """

    name: str
    bits: int
    table: tuple[float, ...] = field(repr=False, compare=False)
    grid_dtype: str = "float32"

    @property
    def read_only(self) -> bool:  # type: ignore[override]
        return self.grid_dtype != "float32"

    @cached_property
    def max_level(self) -> float:  # type: ignore[override]
        return max(level for level in self.table if level == level)

    @cached_property
    def _ordered(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The signed codes in the order of their levels, each level once, and the middles between neighbours."""
        half, at = 1 << (self.bits - 1), {level: code for code, level in reversed([*enumerate(self.table)])}
        levels = sorted(level for level in at if level == level)
        middles = tuple((low + high) / 2 for low, high in pairwise(levels))
        return tuple(at[level] - half for level in levels), middles

    def encode(self, w: Any, grid: Grid) -> Any:
        xp = w.__array_namespace__()
        codes, middles = self._ordered
        x = w * (1 / grid.scale)[..., None]
        found = xp.searchsorted(xp.asarray(middles, dtype=xp.float32), xp.where(x == x, x, 0.0))
        return xp.asarray(codes, dtype=xp.float32)[found]

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        xp = codes.__array_namespace__()
        index = codes.astype(xp.int32) + (1 << (self.bits - 1))
        return xp.asarray(self.table, dtype=xp.float32)[index] * scale.astype(xp.float32)[..., None]


LEVELS = (
    Levels("nf4", 4, NF4),
    Levels("fp4", 4, FP4),
    Levels("f8_e4m3", 8, e4m3_levels()),
    Levels("f8_e4m3_f16", 8, e4m3_levels(), "float16"),
    Levels("f8_e4m3_bf16", 8, e4m3_levels(), "bfloat16"),
)
