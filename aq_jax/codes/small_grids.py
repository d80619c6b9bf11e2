"""Elementwise codes whose grids take fewer bytes than float32, as other programs' files have them.

No quantizer here chooses them: they come from a source that is quantized already. Their grids are float16, bfloat16, or
records of two levels (see `records`); unlike those of float32, scales may be negative or zero. A code q stands for one
of

    q * s
    (q - z) * s                       z: a zero point, a float or an integer of eight bits
    (q - (z - 2^(b-1))) * s           z: a zero point of unsigned codes
    (q + 2^(b-1)) * s + m             m: the value of the lowest code, a minimum

in float32, each step rounded. The product of a code and a scale of so few bits is exact, so that a fused multiply-add
rounds alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from aq_jax.codes.elementwise import Elementwise
from aq_jax.codes.entry import Grid, Host

Offset = Literal["", "zero_point", "integer_zero_point", "unsigned_zero_point", "minimum"]
_SUFFIXES: dict[Offset, str] = {
    "": "", "zero_point": "z", "integer_zero_point": "i", "unsigned_zero_point": "u", "minimum": "m",
}  # fmt: skip
_HALVES = {"float16": "f16", "bfloat16": "bf16"}


class SmallGrids(Elementwise):
    """The base of such codes. An entry adds `name`, `bits`, `offset`, `grid_dtype` and `expand`."""

    offset: Offset
    integral = True
    read_only = True
    max_level = 0.0

    def expand(self, scales: Any, zero_points: Any) -> tuple[Any, Any]:
        """Turn stored grids [*lead, elements] into float32 scales and offsets [*lead, groups]; None for no offsets.

        Offsets are zero points, or minimums.
        """
        raise NotImplementedError

    @property
    def lift(self) -> int:
        """The number that is added to a signed code before it is scaled."""
        return 2 ** (self.bits - 1) if self.offset == "minimum" else 0

    def float_grids(self, scale: Any, zero_point: Any) -> tuple[Any, Any, Any]:
        scale, offset = self.expand(scale, zero_point)
        if self.offset == "minimum":
            return scale, scale.__array_namespace__().full_like(scale, -self.lift), offset
        return scale, offset, None

    def encode(self, w: Any, grid: Grid) -> Any:
        raise NotImplementedError(f"{self.name}: no quantizer chooses such codes")

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        scale, offset = self.expand(scale, zero_point)
        if self.offset == "minimum":
            return (codes + self.lift) * scale[..., None] + offset[..., None]
        return (codes if offset is None else codes - offset[..., None]) * scale[..., None]

    def read(self, data: Host, scales: Host, zero_points: Host, group: int, shape: Any, out: Host) -> None:
        from aq_jax.codes.small_grids_numpy import read

        read(self, data, scales, zero_points, group, out)


@dataclass(frozen=True)
class HalfGrids(SmallGrids):
    """Codes whose scales, and zero points or minimums, are halves: one a group. Zero points may be signed bytes.

    Args:
        bits: The bits of a code, 2 to 8.
        grid_dtype: The dtype of the grids, "float16" or "bfloat16".
        offset: What stands beside the scales: nothing, zero points (of signed codes, integers or not, or of unsigned
            ones), or minimums.

    >>> HalfGrids(4, "float16").name, HalfGrids(5, "bfloat16", "minimum").name
    ('int4_f16', 'int5_bf16m')
    >>> HalfGrids(4, "float16", "integer_zero_point").zero_dtype
    'int8'
    """

    bits: int
    grid_dtype: str
    offset: Offset = ""
    name: str = field(init=False, repr=False)
    zero_points: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"int{self.bits}_{_HALVES[self.grid_dtype]}{_SUFFIXES[self.offset]}")
        object.__setattr__(self, "zero_points", self.offset != "")

    @property
    def zero_dtype(self) -> str:
        return "int8" if self.offset == "integer_zero_point" else self.grid_dtype

    @property
    def zero_base(self) -> int:
        """The number that the zero points of signed codes are less than those that are stored."""
        return 2 ** (self.bits - 1) if self.offset == "unsigned_zero_point" else 0

    def refuses_grids(self, scales: Host, zero_points: Host) -> str:
        from aq_jax.codes.small_grids_numpy import refuses_numbers

        return refuses_numbers(scales, "scales") or refuses_numbers(zero_points, "zero_points")

    def expand(self, scales: Any, zero_points: Any) -> tuple[Any, Any]:
        if not self.zero_points:
            return scales.astype("float32"), None
        return scales.astype("float32"), zero_points.astype("float32") - self.zero_base


def half_grids(bits: int) -> list[HalfGrids]:
    """List the codes of a width.

    >>> [code.name for code in half_grids(4)][:5]
    ['int4_f16', 'int4_f16z', 'int4_f16i', 'int4_f16u', 'int4_f16m']
    """
    return [HalfGrids(bits, dtype, offset) for dtype in _HALVES for offset in _SUFFIXES]
