"""Levels whose scales are quantized once more, as bitsandbytes nests them: a byte numbers the scale of a group.

    scale of group g = levels[i[g]] * largest[g // 256] + offset        each step rounded to float32

`scales` has the bytes i; `zero_points` has float32: 256 levels, the offset, and the largest of each 256 groups. Groups
are counted through the row of the table, so that nothing can be cut out of a QTensor of such scales. Rows of a table
have them, and a source that is converted into one; what is loaded has float32 scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from aq_jax.codes import levels
from aq_jax.codes.elementwise import Elementwise
from aq_jax.codes.entry import Grid, Host, Shape

BLOCK = 256
"""The groups that share a largest one."""
LEVELS = 256
"""The levels of scales."""
_HEAD = LEVELS + 1


@dataclass(frozen=True)
class Nested(Elementwise):
    """Codes that number levels, with nested scales.

    Args:
        base: The code with float32 scales.

    >>> nf4 = Nested(levels.LEVELS[0])
    >>> nf4.name, nf4.zero_count(64 * 256)
    ('nf4_nested', 321)
    """

    base: levels.Levels
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

    @property
    def in_memory(self) -> levels.Levels:
        return self.base

    def memory_grids(self, scales: Host, zero_points: Host) -> tuple[Host, Host]:
        return self.scales(scales, zero_points), zero_points[:0]

    def refuses_layout(self, shape: Sequence[int], quant_axis: int, group_size: int) -> str:
        if quant_axis == 0 and group_size and len(shape) > 1 and shape[-1] % group_size == 0:
            return ""
        return (
            f"quant_axis is {quant_axis}, group_size {group_size} and shape {list(shape)}; wanted two axes or "
            f"more, and whole groups in each row, as {self.name} has them"
        )

    def refuses_grids(self, scales: Host, zero_points: Host) -> str:
        size = abs(zero_points)
        # So that neither products nor sums are too small or large for float32.
        if not ((size == 0) | ((size >= 2.0**-60) & (size <= 2.0**60))).all():
            return "zero_points are not all finite, 0 or of a magnitude from 2^-60 to 2^60"
        return self.base.refuses_grids(*self.memory_grids(scales, zero_points)) if scales.size else ""

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        return BLOCK * group  # whole bytes of codes, too

    def read_step(self, shape: Sequence[int]) -> int:
        return max(prod(shape), 1)

    def scales(self, numbers: Any, zero_points: Any) -> Any:
        """Compute the float32 scales of all groups of a tensor, of the shape of `numbers`.

        Raises:
            ValueError: for grids that were cut.
        """
        if zero_points.size != (count := self.zero_count(numbers.size)):
            raise ValueError(
                f"{self.name}: {numbers.size} groups have {zero_points.size} zero points, wanted {count}: a tensor of "
                "nested scales cannot be cut; save it as a table, and load that"
            )
        xp = numbers.__array_namespace__()
        table, largest = zero_points[:LEVELS], zero_points[_HEAD:]
        product = table[numbers.reshape(-1)] * largest[xp.arange(numbers.size) // BLOCK]
        # Nothing is NaN, but compilers do not know: they fuse no multiply-add across it, which would round once only.
        product = xp.where(product == product, product, xp.zeros_like(product))
        return (product + zero_points[LEVELS]).reshape(numbers.shape)

    def encode(self, w: Any, grid: Grid) -> Any:
        raise NotImplementedError(f"{self.name}: no quantizer chooses such codes")

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        return self.base.decode(codes, self.scales(scale, zero_point), None)

    def read(
        self, data: Host, scales: Host, zero_points: Host, group: int, shape: Sequence[int], out: Host
    ) -> None:  # fmt: skip
        self.base.read(data, *self.memory_grids(scales, zero_points), group, shape, out)

    def values(self, q: Any) -> Any:
        return self.base.values(self._plain(q))

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        return self.base.take(self._plain(table), ids, inside)

    def _plain(self, q: Any) -> Any:
        """Undo the nesting of a QTensor's scales, for the methods of `base`."""
        return dataclasses.replace(q, scale=self.scales(q.scale, q.zero_point), zero_point=None)


NESTED = tuple(Nested(code) for code in levels.LEVELS if code.bits == 4)
