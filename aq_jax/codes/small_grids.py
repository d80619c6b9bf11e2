"""Elementwise codes whose grids take fewer bytes than a float32 scale and zero point, as other programs have them.

No quantizer here chooses them: they come from a source that is quantized already. Their scales are float16, bfloat16,
float32, or records of two levels (see `records`); unlike those that are chosen here, they may be negative or zero. A
code q stands for one of

    q * s
    (q - z) * s                       z: a zero point, a half, or an integer of eight bits or of the code's
    (q - (z - 2^(b-1))) * s           z: a zero point of unsigned codes
    (q + 2^(b-1)) * s + m             m: the value of the lowest code, a minimum
    q * s + a                         a: the value of code 0, an addend

in float32, each step rounded. Something is added to products of halves or records alone, which are exact, so that a
fused multiply-add rounds alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aq_jax.codes.elementwise import Elementwise
from aq_jax.codes.entry import Grid, Host
from aq_jax.codes.runs import run_of

Offset = Literal[
    "", "zero_point", "integer_zero_point", "packed_zero_point", "unsigned_zero_point", "minimum", "addend"
]
_SUFFIXES: dict[Offset, str] = {
    "": "", "zero_point": "z", "integer_zero_point": "i", "packed_zero_point": "p", "unsigned_zero_point": "u",
    "minimum": "m", "addend": "a",
}  # fmt: skip
_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


class SmallGrids(Elementwise):
    """The base of such codes. An entry adds `name`, `bits`, `offset`, `grid_dtype` and `expand`."""

    offset: Offset
    integral = True
    read_only = True
    max_level = 0.0

    def expand(self, scales: Any, zero_points: Any) -> tuple[Any, Any]:
        """Turn stored grids [*lead, elements] into float32 scales and offsets [*lead, groups]; None for no offsets.

        Offsets are zero points, minimums or addends.
        """
        raise NotImplementedError

    @property
    def adds(self) -> bool:
        """Tell whether the offset is added to the scaled code."""
        return self.offset in ("minimum", "addend")

    @property
    def lift(self) -> int:
        """The number that is added to a signed code before it is scaled."""
        return 2 ** (self.bits - 1) if self.offset == "minimum" else 0

    def float_grids(self, scale: Any, zero_point: Any) -> tuple[Any, Any, Any]:
        scale, offset = self.expand(scale, zero_point)
        if self.adds:
            return scale, scale.__array_namespace__().full_like(scale, -self.lift), offset
        return scale, offset, None

    def encode(self, w: Any, grid: Grid) -> Any:
        raise NotImplementedError(f"{self.name}: no quantizer chooses such codes")

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        scale, offset = self.expand(scale, zero_point)
        if self.adds:
            return (codes + self.lift) * scale[..., None] + offset[..., None]
        return (codes if offset is None else codes - offset[..., None]) * scale[..., None]

    def read(self, data: Host, scales: Host, zero_points: Host, group: int, shape: Any, out: Host) -> None:
        from aq_jax.codes.small_grids_numpy import read

        read(self, data, scales, zero_points, group, out)


@dataclass(frozen=True)
class PlainGrids(SmallGrids):
    """Codes with one scale a group, a half or a float32, and perhaps an offset of its dtype, or a signed byte.

    Args:
        bits: The bits of a code, 2 to 8.
        grid_dtype: The dtype of scales, "float16", "bfloat16" or "float32".
        offset: What stands beside the scales: nothing, zero points (of signed codes, numbers, integers of a byte, or
            packed as codes are; or of unsigned ones), minimums, or addends.

    >>> PlainGrids(4, "float16").name, PlainGrids(5, "bfloat16", "minimum").name
    ('int4_f16', 'int5_bf16m')
    >>> PlainGrids(4, "float32", "integer_zero_point").zero_dtype
    'int8'
    """

    bits: int
    grid_dtype: str
    offset: Offset = ""
    name: str = field(init=False, repr=False)
    zero_points: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"int{self.bits}_{_DTYPES[self.grid_dtype]}{_SUFFIXES[self.offset]}")
        object.__setattr__(self, "zero_points", self.offset != "")

    @property
    def packs_zeros(self) -> bool:
        """Tell whether zero points are packed, a row of them into whole bytes."""
        return self.offset == "packed_zero_point"

    @property
    def zero_dtype(self) -> str:
        return {"integer_zero_point": "int8", "packed_zero_point": "uint8"}.get(self.offset, self.grid_dtype)

    def zero_count(self, groups: int) -> int:
        return groups * self.bits // 8 if self.packs_zeros else groups

    def refuses_layout(self, shape: Sequence[int], quant_axis: int, group_size: int) -> str:
        run, _ = run_of(self.bits)
        grouped = quant_axis == 0 and group_size and len(shape) > 1
        if not self.packs_zeros or (grouped and shape[-1] % (run * group_size) == 0):
            return ""
        return (
            f"quant_axis is {quant_axis}, group_size {group_size} and shape {list(shape)}; wanted two axes or "
            f"more, and a multiple of {run} groups in each row, as {self.name} has them"
        )

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        return super().cut_step(run_of(self.bits)[0] * group if self.packs_zeros else group, shape)

    def read_step(self, shape: Sequence[int]) -> int:
        return max(shape[-1], 1) if self.packs_zeros else super().read_step(shape)

    @property
    def zero_base(self) -> int:
        """The number that the zero points of signed codes are less than those that are stored."""
        return 2 ** (self.bits - 1) if self.offset == "unsigned_zero_point" else 0

    def refuses_grids(self, scales: Host, zero_points: Host) -> str:
        from aq_jax.codes.small_grids_numpy import refuses_numbers

        return refuses_numbers(scales, "scales") or (
            "" if self.packs_zeros else refuses_numbers(zero_points, "zero_points")
        )

    def expand(self, scales: Any, zero_points: Any) -> tuple[Any, Any]:
        if not self.zero_points:
            return scales.astype("float32"), None
        zeros = self.unpacked_zeros(zero_points) if self.packs_zeros else zero_points.astype("float32")
        return scales.astype("float32"), zeros - self.zero_base

    def unpacked_zeros(self, zero_points: Any) -> Any:
        """Unpack zero points: [*lead, bytes] to float32 [*lead, groups]."""
        import numpy as np

        if zero_points.__array_namespace__() is np:
            from aq_jax.codes.bits import unpack_codes

            octets, count = np.ascontiguousarray(zero_points), zero_points.size * 8 // self.bits
            return unpack_codes(octets.reshape(-1), self.bits, count).reshape(*octets.shape[:-1], -1).astype(np.float32)
        from aq_jax.codes import bits_jax

        return bits_jax.unpack_float(zero_points, self.bits)


def plain_grids(bits: int) -> list[PlainGrids]:
    """List the codes of a width. With float32 scales, codes of float zero points are `Affine`.

    Zero points are packed beside codes of two bits, where those of a byte would take a good part of the room.

    >>> [code.name for code in plain_grids(4)][:6]
    ['int4_f16', 'int4_f16z', 'int4_f16i', 'int4_f16u', 'int4_f16m', 'int4_f16a']
    >>> [code.name for code in plain_grids(2)][14:]
    ['int2_f32', 'int2_f32i', 'int2_f32p']
    """
    integers: list[Offset] = ["", "integer_zero_point", *(["packed_zero_point"] if bits == 2 else [])]
    offsets: list[Offset] = [offset for offset in _SUFFIXES if offset in integers or offset != "packed_zero_point"]
    halves = [PlainGrids(bits, dtype, offset) for dtype in ("float16", "bfloat16") for offset in offsets]
    return [*halves, *(PlainGrids(bits, "float32", offset) for offset in integers)]
