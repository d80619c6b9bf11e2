"""Codes of a fixed number of bits an element, one after the other in the stream of `codes.bits`."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod
from typing import Any

from aq_jax.codes.entry import Code, Grid, Host, Shape
from aq_jax.codes.runs import fills_bytes, run_of

GROUP = 128


class Elementwise(Code):
    """The base of codes with a fixed number of bits an element. An entry adds `name`, `bits`, `encode` and `decode`.

    A QTensor holds them as rows of bytes where rows are whole bytes, and otherwise as one signed byte a code.
    """

    @property
    def plain_name(self) -> str:
        return self.name

    @property
    def rotated_name(self) -> str:
        return ""

    def quantizer(self, symmetric: bool) -> str:
        return "absmax"

    def grouping(self, per_channel: bool | None, group_size: int) -> tuple[bool, int]:
        if group_size or per_channel is not None:
            return bool(per_channel), group_size
        return (True, 0) if self.bits == 8 else (False, GROUP)

    @property
    def instead(self) -> str:
        return self.plain_name

    def data_bytes(self, count: int, shape: Sequence[int] = ()) -> int:
        return -(-count * self.bits // 8)

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        return lcm(group, 8)

    def read_step(self, shape: Sequence[int]) -> int:
        return run_of(self.bits)[0]

    def span(self, start: int, stop: int, shape: Sequence[int]) -> tuple[int, int]:
        return start * self.bits // 8, -(-stop * self.bits // 8)

    def read(
        self,
        data: Host,
        scales: Host,
        zero_points: Host,
        group: int,
        shape: Sequence[int],
        out: Host,
    ) -> None:
        from aq_jax.codes.elementwise_numpy import read

        read(self, data, scales, zero_points, group, out)

    def fill(self, codes: Host, scales: Host, zeros: Host | None, out: Host) -> None:
        """Decode int8 codes [groups, size] into float32; `zeros` is None where all are zero."""
        out[...] = self.decode(codes.astype("float32"), scales, zeros)

    def packed(self, length: int) -> bool:
        """Tell whether rows of this many codes are stored as bytes; eight-bit codes are always int8."""
        return self.bits < 8 and fills_bytes(length, self.bits)

    def codes_like(self, shape: Shape) -> tuple[Shape, str]:
        if self.packed(shape[-1]):
            return (*shape[:-1], shape[-1] * self.bits // 8), "uint8"
        return shape, "int8"

    def rows(self, shape: Shape) -> int | None:
        return None

    def shape(self, codes: Shape, length: int, rows: int | None) -> Shape:
        return (*codes[:-1], length)

    def from_stream(self, stream: Host, shape: Shape) -> Host:
        from aq_jax.codes.bits import unpack_codes

        if self.packed(shape[-1]):
            return stream.reshape(self.codes_like(shape)[0])
        return unpack_codes(stream, self.bits, prod(shape)).reshape(shape)

    def to_stream(self, codes: Host, shape: Shape) -> Host:
        from aq_jax.codes.bits import pack_codes

        return pack_codes(codes, self.bits) if codes.dtype == "int8" else codes.reshape(-1)

    def row_start(self, row: int, shape: Shape) -> int:
        codes, _ = self.codes_like(shape)
        return row * prod(codes[1:]) * shape[-1] // codes[-1] if codes[-1] else 0

    def axes(self, ndim: int) -> tuple[int | None, ...]:
        return tuple(range(ndim))

    def refuses_shards(self, shape: Shape, parts: Sequence[int]) -> str:
        count = self.codes_like(shape)[0][-1]
        # Rows are read whole; a tensor of one row is read from where its codes fill bytes.
        step = self.read_step(shape) if len(shape) == 1 and parts[0] > 1 and self.packed(shape[0]) else 1
        if count % parts[-1] == 0 and shape[-1] // parts[-1] % step == 0:
            return ""
        return (
            f"cuts the {shape[-1]} columns into {parts[-1]} parts; wanted parts of whole bytes, but a row of "
            f"{self.bits}-bit codes has {count} of them"
        )

    def encode_unrounded(self, w: Any, grid: Grid) -> Any:
        return self.encode(w, grid)

    def levels(self, q: Any) -> Any:
        from aq_jax.codes.elementwise_jax import levels

        return levels(self, q)

    def values(self, q: Any) -> Any:
        from aq_jax.codes.elementwise_jax import values

        return values(self, q)

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        from aq_jax.codes.elementwise_jax import take

        return take(self, table, ids, inside)
