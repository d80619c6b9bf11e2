"""The types of GGUF's tensors: how many bytes a block of elements has, and what a table stores them as."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class TensorType:
    """A type of tensors.

    Args:
        name: The type's name in ggml.
        block: The elements of a block; blocks lie along the last axis.
        size: The bytes of a block.
        dtype: The dtype of plain numbers; "" for codes.
        quant_type: The table's type for codes; "" for codes that no table holds.
        group: The elements of a group of that type.
    """

    name: str
    block: int
    size: int
    dtype: str = ""
    quant_type: str = ""
    group: int = 0

    def nbytes(self, shape: Sequence[int]) -> int:
        """Count the bytes of a tensor whose last axis is a multiple of the block.

        >>> TYPES[2].nbytes((3, 64))
        108
        """
        return prod(shape) // self.block * self.size


def _plain(name: str, dtype: str, size: int) -> TensorType:
    return TensorType(name, 1, size, dtype)


TYPES: Mapping[int, TensorType] = MappingProxyType({
    0: _plain("F32", "float32", 4),
    1: _plain("F16", "float16", 2),
    2: TensorType("Q4_0", 32, 18, quant_type="int4_f16", group=32),
    3: TensorType("Q4_1", 32, 20, quant_type="int4_f16m", group=32),
    6: TensorType("Q5_0", 32, 22, quant_type="int5_f16", group=32),
    7: TensorType("Q5_1", 32, 24, quant_type="int5_f16m", group=32),
    8: TensorType("Q8_0", 32, 34, quant_type="int8_f16", group=32),
    9: TensorType("Q8_1", 32, 36),
    10: TensorType("Q2_K", 256, 84, quant_type="q2_k", group=16),
    11: TensorType("Q3_K", 256, 110, quant_type="q3_k", group=16),
    12: TensorType("Q4_K", 256, 144, quant_type="q4_k", group=32),
    13: TensorType("Q5_K", 256, 176, quant_type="q5_k", group=32),
    14: TensorType("Q6_K", 256, 210, quant_type="q6_k", group=16),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: _plain("I8", "int8", 1),
    25: _plain("I16", "int16", 2),
    26: _plain("I32", "int32", 4),
    27: _plain("I64", "int64", 8),
    28: _plain("F64", "float64", 8),
    29: TensorType("IQ1_M", 256, 56),
    30: _plain("BF16", "bfloat16", 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
})  # fmt: skip
"""Numbers in the file -> types."""

READABLE = tuple(each.name for each in TYPES.values() if each.dtype or each.quant_type)
"""The types that tables hold."""
