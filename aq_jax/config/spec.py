"""The numerics of one tensor."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from aq_jax.codes import CODES, Code
from aq_jax.errors import ConfigError

LARGEST_ROTATION = 128


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """The numerics of one quantized tensor: hashable, so that it can be a static part of a pytree.

    Args:
        bits: The width of a code: 8, 6, 5, 4, 3 or 2.
        per_channel: Whether each index of axis 0 has one grid.
        group_size: The number of consecutive elements of the flattened tensor that share a grid; 0 for none.
        rotation: The block size of the Hadamard matrix that the last axis was multiplied by; 0 for none (see
            `codes.rotation`).
        code: The name of another code than evenly spaced levels in so many bits; see `codes.CODES`.

    Neither channels nor groups means one grid for the tensor. Decoding needs these fields, and a table stores them; how
    codes were chosen, and whether zero points are constant, belongs to the policy.

    >>> QuantSpec(bits=2, group_size=128).group_elements((384, 1536))
    128
    >>> QuantSpec(bits=8, per_channel=True).group_elements((384, 1536))
    1536
    """

    bits: int = 8
    per_channel: bool = False
    group_size: int = 0
    rotation: int = 0
    code: str = ""

    def __post_init__(self) -> None:
        if self.code == f"int{self.bits}":  # one spelling: two would be two trees, and two programs
            object.__setattr__(self, "code", "")

    def __repr__(self) -> str:
        return f"QuantSpec({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @property
    def coding(self) -> Code:
        """The entry of `CODES`, the same one whether weights are rotated or not.

        Raises:
            ConfigError: if there is none.
        """
        name = self.code or f"int{self.bits}"
        if name not in CODES:
            raise ConfigError(f"{self}: there is no code {name!r}; known are {', '.join(CODES)}")
        return CODES[name]

    @property
    def quant_type(self) -> str:
        """The format's column."""
        if not self.code:
            return f"int{self.bits}h" if self.rotation else f"int{self.bits}"
        return self.coding.rotated_name if self.rotation else self.code

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; `code` only where it says more than `bits`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields if self.code else {name: value for name, value in fields.items() if name != "code"}

    @property
    def quant_axis(self) -> int:
        """Return the format's column: -1 for one grid a tensor, 0 for channels and groups."""
        return 0 if self.per_channel or self.group_size else -1

    def group_elements(self, shape: tuple[int, ...]) -> int:
        """Count the consecutive elements of the flattened tensor that share a grid (at least 1)."""
        if self.group_size:
            return self.group_size
        return max(1, math.prod(shape[1:] if self.per_channel else shape))

    def group_count(self, shape: tuple[int, ...]) -> int:
        """Count the grids of a tensor of this shape; one grid a tensor means one, even if the tensor is empty."""
        if self.group_size:
            return -(-math.prod(shape) // self.group_size)
        return (shape[0] if shape else 1) if self.per_channel else 1
