"""Levels whose scales are quantized once more, as bitsandbytes nests them: a byte numbers the scale of a group.

    scale of group g = levels[i[g]] * largest[g // 256] + offset        each step rounded to float32

`scales` has the bytes i; `zero_points` has float32: 256 levels, the offset, and the largest of each 256 groups. Groups
are counted through the tensor, so that a row of it has no zero points of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from aq_jax.codes.elementwise import Elementwise
from aq_jax.codes.entry import Grid, Host, Shape
from aq_jax.codes.levels import LEVELS, Levels
from aq_jax.errors import FormatError

BLOCK = 256
"""The groups that share a largest one."""
_LEVELS = 256
_HEAD = _LEVELS + 1


@dataclass(frozen=True)
class Nested(Elementwise):
    """Codes that number levels, with nested scales, which may be negative or zero.

    Args:
        base: The code with float32 scales.

    >>> Nested(LEVELS[0]).name, Nested(LEVELS[0]).zero_count(64 * 256)
    ('nf4_nested', 321)
    """

    base: Levels
    name: str = field(init=False, repr=False)
    bits: int = field(init=False, repr=False)
    zero_points = True
    grid_dtype = "uint8"
    read_only = True
    max_level = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.base.name}_nested")
        object.__setattr__(self, "bits", self.base.bits)

    @property
    def zero_dtype(self) -> str:
        return "float32"

    def zero_count(self, groups: int) -> int:
        return _HEAD + -(-groups // BLOCK)

    def zero_shape(self, groups: Shape) -> Shape:
        return (self.zero_count(prod(groups)),)

    def cut_zeros(self, zero_points: Host, start: int, stop: int) -> Host:
        from numpy import concatenate

        return concatenate([zero_points[:_HEAD], zero_points[_HEAD + start // BLOCK : _HEAD + -(-stop // BLOCK)]])

    def join_zeros(self, parts: Sequence[Host]) -> Host:
        from numpy import concatenate

        head = parts[0][:_HEAD]
        if any((part[:_HEAD] != head).any() for part in parts):
            raise FormatError(f"pieces of a tensor of {self.name} have several tables of levels; wanted one")
        return concatenate([head, *(part[_HEAD:] for part in parts)])

    def refuses_layout(self, shape: Sequence[int], quant_axis: int, group_size: int) -> str:
        if quant_axis or not group_size:
            return f"quant_axis is {quant_axis} and group_size {group_size}; {self.name} has groups"
        return "" if len(shape) > 1 else f"shape is {list(shape)}; {self.name} needs two axes or more"

    def refuses_grids(self, scales: Host, zero_points: Host) -> str:
        size = abs(zero_points)
        # So that neither products nor sums are too small or large for float32.
        if not ((size == 0) | ((size >= 2.0**-60) & (size <= 2.0**60))).all():
            return "zero_points are not all finite, 0 or of a magnitude from 2^-60 to 2^60"
        return ""

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        return BLOCK * group  # whole bytes of codes, too

    def read_step(self, shape: Sequence[int]) -> int:
        return max(prod(shape), 1)

    def scales(self, numbers: Any, zero_points: Any) -> Any:
        """Compute the float32 scales of all groups of a tensor, of the shape of `numbers`."""
        xp = numbers.__array_namespace__()
        levels, largest = zero_points[:_LEVELS], zero_points[_HEAD:]
        product = levels[numbers.reshape(-1)] * largest[xp.arange(numbers.size) // BLOCK]
        # Nothing is NaN, but compilers do not know: they fuse no multiply-add across it, which would round once only.
        product = xp.where(product == product, product, xp.zeros_like(product))
        return (product + zero_points[_LEVELS]).reshape(numbers.shape)

    def encode(self, w: Any, grid: Grid) -> Any:
        raise NotImplementedError(f"{self.name}: no quantizer chooses such codes")

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        return self.base.decode(codes, self.scales(scale, zero_point), None)

    def read(
        self, data: Host, scales: Host, zero_points: Host, group: int, shape: Sequence[int], out: Host
    ) -> None:  # fmt: skip
        found = self.scales(scales, zero_points)
        self.base.read(data, found, found[:0], group, shape, out)

    def values(self, q: Any) -> Any:
        return self.base.values(self._plain(q))

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        return self.base.take(self._plain(table), ids, inside)

    def _plain(self, q: Any) -> Any:
        """Undo the nesting of a QTensor's scales, for the methods of `base`."""
        return dataclasses.replace(q, scale=self.scales(q.scale, q.zero_point), zero_point=None)


NESTED = tuple(Nested(code) for code in LEVELS if code.bits == 4)
