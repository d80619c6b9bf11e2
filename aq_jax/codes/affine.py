"""Evenly spaced levels: a code q stands for (q - zero_point) * scale."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Affine:
    """Signed codes of one width, each in as many bits of a stream.

    Args:
        bits: of a code, 2 to 8.
        rotated: whether the codes stand for weights whose last axis was rotated (see `codes.rotation`).

    >>> Affine(5).name, Affine(5).data_bytes(231)
    ('int5', 145)
    """

    bits: int
    rotated: bool = False

    @property
    def name(self) -> str:
        """The format's `quant_type`."""
        return f"int{self.bits}h" if self.rotated else f"int{self.bits}"

    def data_bytes(self, count: int) -> int:
        """Bytes of a stream of so many codes."""
        return -(-count * self.bits // 8)
