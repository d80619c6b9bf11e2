"""Trellis codes: each weight shifts a few bits into a state of 12 bits, and the state's hash is its level.

The weights of a tile, which is 256 rows of a matrix, follow each other column by column in one stream of bits. Step e
shifts in `step_bits` bits; its state is the 12 bits of the stream from bit e * step_bits on, and the stream is a ring.
So a weight costs exactly `step_bits`, its level depends on those of its neighbours, and any weight can be decoded
alone: it has the choice of levels of a 12-bit code, as far as its neighbours leave it one (QTIP, arXiv:2406.11235).
Levels are integers of 8 bits that lie nearly like a normal distribution, and each row of a matrix has a scale. There
are no zero points. docs/format.md has the layout by an example.

`trellis_numpy` decodes rows of a table, `trellis_jax` QTensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from aq_jax.codes.entry import Code, Grid, Host, Shape
from aq_jax.errors import ConfigError

TILE_ROWS = 256
STATE_BITS = 12
# A state's level: the sum of the bytes of (state * factor + summand) mod 2^32, from 0 to 1020, divided by 4, less 127.
# For the second row of a step another hash of the same state. Of 120 and 150 pairs drawn at random, these had the least
# error on normally distributed weights.
HASHES = ((0xBD8E8CD7, 0xED71BC08), (0x6F531C4F, 0x65330338))


@dataclass(frozen=True)
class Trellis(Code):
    """A trellis code of so many bits a step.

    Args:
        step_bits: The bits that a step shifts into the state, 2 to 5.
        step_rows: The weights of a step, 1 or 2: that many rows, one below the other, in one column.

    >>> Trellis(3).name, Trellis(3).data_bytes(384 * 10, (384, 10)), Trellis(3, 2).name
    ('tcq3', 1440, 'tcq1.5')
    """

    step_bits: int
    step_rows: int = 1
    name: str = field(init=False, repr=False)
    bits: int = field(init=False, repr=False)
    max_level = 0.0
    integral = True
    matrices = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"tcq{self.step_bits / self.step_rows:g}")
        object.__setattr__(self, "bits", -(-self.step_bits // self.step_rows))

    @property
    def plain_name(self) -> str:
        return self.name

    @property
    def rotated_name(self) -> str:
        return self.name

    def quantizer(self, symmetric: bool) -> str:
        return "viterbi"

    def grouping(self, per_channel: bool | None, group_size: int) -> tuple[bool, int]:
        if group_size or per_channel is False:
            raise ConfigError(
                f"{self.name} has one scale a row: leave per_channel and group_size out, or set per_channel = true"
            )
        return True, 0

    # Where tiles lie

    @property
    def instead(self) -> str:
        return f"int{self.bits}"

    def refuses_layout(self, shape: Sequence[int], quant_axis: int, group_size: int) -> str:
        what = f"{self.name} of shape {list(shape)}"
        if len(shape) < 2:
            return f"{what} needs a matrix: two axes or more"
        rows, columns = shape[-2:]
        if quant_axis or group_size != (columns if len(shape) > 2 else 0):
            wanted = f"0 and {columns if len(shape) > 2 else 0}"
            return f"{what} has one scale a row, quant_axis and group_size {wanted}, not {quant_axis} and {group_size}"
        if rows % self.step_rows:
            return f"{what} needs an even number of rows"
        if (bits := self._steps((rows % TILE_ROWS or min(rows, TILE_ROWS)) * columns) * self.step_bits) < STATE_BITS:
            return f"{what} needs {STATE_BITS} bits in each tile of up to {TILE_ROWS} rows; the last has {bits}"
        return ""

    def tile_bytes(self, rows: int, columns: int) -> int:
        """Count the bytes of one tile."""
        return -(-self._steps(rows * columns) * self.step_bits // 8)

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Count the bytes of a matrix, each of whose tiles begins at a whole byte."""
        return rows // TILE_ROWS * self.tile_bytes(TILE_ROWS, columns) + self.tile_bytes(rows % TILE_ROWS, columns)

    def _steps(self, count: int) -> int:
        return -(-count // self.step_rows)

    def data_bytes(self, count: int, shape: Sequence[int]) -> int:
        rows, columns = shape[-2:]
        if self._even(shape):
            return self.matrix_bytes(-(-count // max(columns, 1)), columns)
        return -(-count // max(rows * columns, 1)) * self.matrix_bytes(rows, columns)

    def read_step(self, shape: Sequence[int]) -> int:
        rows, columns = shape[-2:]
        return max((TILE_ROWS if self._even(shape) else rows) * columns, 1)

    def cut_step(self, group: int, shape: Sequence[int]) -> int:
        return self.read_step(shape)

    def span(self, start: int, stop: int, shape: Sequence[int]) -> tuple[int, int]:
        return self.data_bytes(start, shape), self.data_bytes(stop, shape)

    def _even(self, shape: Sequence[int]) -> bool:
        """Tell whether all tiles but the tensor's last are whole, so that they lie as those of one matrix do."""
        return len(shape) == 2 or shape[-2] % TILE_ROWS == 0

    def read(
        self,
        data: Host,
        scales: Host,
        zero_points: Host,
        group: int,
        shape: Sequence[int],
        out: Host,
    ) -> None:
        from aq_jax.codes.trellis_numpy import read

        read(self, data, scales, shape, out)

    # A QTensor holds the bytes of each matrix as they are in the table

    def codes_like(self, shape: Shape) -> tuple[Shape, str]:
        return (*shape[:-2], self.matrix_bytes(*shape[-2:])), "uint8"

    def rows(self, shape: Shape) -> int:
        return shape[-2]

    def shape(self, codes: Shape, length: int, rows: int | None) -> Shape:
        assert rows is not None  # noqa: S101
        return (*codes[:-1], rows, length)

    def from_stream(self, stream: Host, shape: Shape) -> Host:
        return stream.reshape(self.codes_like(shape)[0])

    def to_stream(self, codes: Host, shape: Shape) -> Host:
        return codes.reshape(-1)

    def row_start(self, row: int, shape: Shape) -> int:
        *lead, rows, columns = shape
        if lead:
            return row * prod(shape[1:])
        return min(-(-row // self.tile_bytes(TILE_ROWS, columns)) * TILE_ROWS, rows) * columns

    def axes(self, ndim: int) -> tuple[int | None, ...]:
        return tuple(range(ndim - 1))

    def refuses_shards(self, shape: Shape, parts: Sequence[int]) -> str:
        if parts[-1] > 1:
            return f"cuts the {shape[-1]} columns into {parts[-1]} parts; a tile of {self.name} has all columns"
        if parts[-2] > 1 and shape[-2] // parts[-2] % TILE_ROWS:
            return (
                f"cuts the {shape[-2]} rows into {parts[-2]} parts; wanted parts of whole tiles, each {TILE_ROWS} rows"
            )
        return ""

    # Numbers. Codes are chosen a tile at a time: there are no grids to round to.

    def encode(self, w: Any, grid: Grid) -> Any:
        raise NotImplementedError(f"{self.name} is encoded a tile at a time")

    def encode_unrounded(self, w: Any, grid: Grid) -> Any:
        return self.encode(w, grid)

    def decode(self, codes: Any, scale: Any, zero_point: Any) -> Any:
        return codes * scale[..., None]

    def levels(self, q: Any) -> Any:
        from aq_jax.codes.trellis_jax import levels

        return levels(self, q)

    def values(self, q: Any) -> Any:
        return self.levels(q).astype("float32") * q.scale

    def take(self, table: Any, ids: Any, inside: Any) -> Any:
        from aq_jax.codes.trellis_jax import take

        return take(self, table, ids, inside)
