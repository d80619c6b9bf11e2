"""GGUF's codes of two-level scales: a half for 256 elements times a small integer for each of their groups.

A record of `scales` stands for 256 consecutive elements: float16 d, then the integer of each group in a stream of
`sub_bits` bits (see `bits`). A record of `zero_points`, if there is one, has the same form, and stands for minimums:
their float16 times their integers is what is subtracted.

    q2_k    16 groups of 16    scales and minimums of 4 bits, unsigned
    q3_k    16 groups of 16    scales of 6 bits, signed
    q4_k     8 groups of 32    scales and minimums of 6 bits, unsigned
    q5_k     8 groups of 32    scales and minimums of 6 bits, unsigned
    q6_k    16 groups of 16    scales of 8 bits, signed

Source: github.com/ggml-org/llama.cpp, ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aq_jax.codes.entry import Host
from aq_jax.codes.small_grids import Offset, SmallGrids
from aq_jax.errors import ConfigError

RECORD = 256
"""The elements of a record."""
_HALF_BYTES = 2


@dataclass(frozen=True)
class Records(SmallGrids):
    """Codes of two-level scales.

    Args:
        bits: The bits of a code.
        group: The elements of a group.
        sub_bits: The bits of a group's integer.
        offset: "minimum" where each group has one; its integers, and those of scales, are unsigned then.

    >>> Records(4, 32, 6, "minimum").name, Records(4, 32, 6, "minimum").grid_block
    ('q4_k', (8, 8))
    """

    bits: int
    group: int
    sub_bits: int
    offset: Offset = ""
    name: str = field(init=False, repr=False)
    zero_points: bool = field(init=False, repr=False)
    grid_block: tuple[int, int] = field(init=False, repr=False)
    grid_dtype: str = field(default="uint8", init=False, repr=False)

    def __post_init__(self) -> None:
        groups = RECORD // self.group
        object.__setattr__(self, "name", f"q{self.bits}_k")
        object.__setattr__(self, "zero_points", self.offset != "")
        object.__setattr__(self, "grid_block", (groups, _HALF_BYTES + groups * self.sub_bits // 8))

    def grouping(self, per_channel: bool | None, group_size: int) -> tuple[bool, int]:
        if per_channel or group_size not in (0, self.group):
            raise ConfigError(f"{self.name}: has groups of {self.group} elements")
        return False, self.group

    def refuses_layout(self, shape: Sequence[int], quant_axis: int, group_size: int) -> str:
        if (quant_axis, group_size) != (0, self.group):
            return f"quant_axis is {quant_axis} and group_size {group_size}; {self.name} has groups of {self.group}"
        if not shape or shape[-1] % RECORD:
            return f"shape is {list(shape)}; the last axis of {self.name} rows must be a multiple of {RECORD}"
        return ""

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        return RECORD

    def read_step(self, shape: Sequence[int]) -> int:
        return RECORD

    def expand(self, scales: Any, zero_points: Any) -> tuple[Any, Any]:
        scale = self._expanded(scales)
        return scale, -self._expanded(zero_points) if self.offset == "minimum" else None

    def refuses_grids(self, scales: Host, zero_points: Host) -> str:
        from aq_jax.codes.small_grids_numpy import refuses_numbers

        size = self.grid_block[1]
        halves = {
            "scales": scales.reshape(-1, size)[:, :_HALF_BYTES].copy().view("float16"),
            "zero_points": zero_points.reshape(-1, size)[:, :_HALF_BYTES].copy().view("float16"),
        }
        return next((why for what, numbers in halves.items() if (why := refuses_numbers(numbers, what))), "")

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        from aq_jax.codes.records_jax import take

        return take(self, table, ids, inside)

    def _expanded(self, records: Any) -> Any:
        """Multiply the half of each record by its integers: [*lead, bytes] to [*lead, groups]."""
        import numpy as np

        xp = records.__array_namespace__()
        groups, size = self.grid_block
        blocks = records.reshape(*records.shape[:-1], -1, size)
        if xp is np:
            from aq_jax.codes.bits import unpack_codes

            half = np.ascontiguousarray(blocks[..., :_HALF_BYTES]).view(np.float16)
            packed = np.ascontiguousarray(blocks[..., _HALF_BYTES:]).reshape(-1)
            integers = unpack_codes(packed, self.sub_bits, half.size * groups).reshape(*half.shape[:-1], groups)
            integers = integers.astype(np.float32)
        else:
            from aq_jax.codes import bits_jax
            from aq_jax.codes.records_jax import halves

            half = halves(blocks[..., :_HALF_BYTES])
            packed = blocks[..., _HALF_BYTES:]
            integers = bits_jax.unpack_float(packed.view("int8") if self.sub_bits == 8 else packed, self.sub_bits)
        if self.offset == "minimum":
            integers = integers + 2 ** (self.sub_bits - 1)
        return (half.astype("float32") * integers).reshape(*records.shape[:-1], -1)


def records() -> list[Records]:
    """List the codes of two-level scales.

    >>> [code.name for code in records()]
    ['q2_k', 'q3_k', 'q4_k', 'q5_k', 'q6_k']
    """
    return [
        Records(2, 16, 4, "minimum"),
        Records(3, 16, 6),
        Records(4, 32, 6, "minimum"),
        Records(5, 32, 6, "minimum"),
        Records(6, 16, 8),
    ]
