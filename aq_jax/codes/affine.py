"""Evenly spaced levels: a code q stands for (q - zero_point) * scale, q an integer in [-2^(b-1), 2^(b-1) - 1].

Three ways of rounding, each written without a multiplication that an addition follows in the codes: XLA would
fuse the two into one operation of another rounding, and NumPy would disagree in the last bit.

    tread     q = clip(round(x * (1/scale)), qmin, qmax)                  zero_point 0: zero is a level
    rise      q = clip(floor(x * (1/scale)), qmin, qmax)                  zero_point -0.5: zero lies between two levels
    affine    q = clip(round((x - base) * (1/scale)), 0, n) + qmin        any float zero_point; base is level qmin
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aq_jax.codes.elementwise import GROUP, Elementwise
from aq_jax.codes.entry import Grid, Host


def code_range(bits: int) -> tuple[int, int]:
    """Return (qmin, qmax) of a width.

    >>> code_range(2)
    (-2, 1)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class Affine(Elementwise):
    """Signed codes of one width.

    Args:
        bits: The bits of a code, 2 to 8.
        rotated: Whether the codes stand for weights whose last axis was rotated (see `codes.rotation`).

    >>> Affine(5).name, Affine(5).data_bytes(231), Affine(5, rotated=True).name
    ('int5', 145, 'int5h')
    """

    bits: int
    rotated: bool = False
    name: str = field(init=False, repr=False)
    max_level: float = field(init=False, repr=False)
    uniform = True
    integral = True
    zero_points = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.rotated_name if self.rotated else self.plain_name)
        object.__setattr__(self, "max_level", code_range(self.bits)[1])

    @property
    def plain_name(self) -> str:
        return f"int{self.bits}"

    @property
    def rotated_name(self) -> str:
        return f"int{self.bits}h"

    def quantizer(self, symmetric: bool) -> str:
        if self.bits < 8:
            return "mse"
        return "absmax" if symmetric else "minmax"

    def grouping(self, per_channel: bool | None, group_size: int) -> tuple[bool, int]:
        if self.bits == 2 and per_channel is False and not group_size:
            return False, GROUP  # as published
        return super().grouping(per_channel, group_size)

    def encode(self, w: Any, grid: Grid) -> Any:
        return w.__array_namespace__().round(self.encode_unrounded(w, grid))

    def encode_unrounded(self, w: Any, grid: Grid) -> Any:
        xp = w.__array_namespace__()
        qmin, qmax = code_range(self.bits)
        shifted = w - grid.base[..., None] if grid.rounding == "affine" else w
        q = shifted * (1 / grid.scale)[..., None]
        if grid.rounding == "affine":
            # Rounded before qmin is added: the sum would be rounded elsewhere.
            q = xp.round(xp.clip(q, 0, qmax - qmin)) + qmin
        else:
            q = xp.clip(xp.floor(q) if grid.rounding == "mid_rise" else q, qmin, qmax)
        return xp.where(q == q, q, 0.0)

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        return (codes - zero_point[..., None]) * scale[..., None]

    def fill(self, codes: Host, scales: Host, zeros: Host | None, out: Host) -> None:
        out[...] = codes
        if zeros is not None:
            out -= zeros[:, None]
        out *= scales[:, None]
