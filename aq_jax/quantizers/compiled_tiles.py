"""Quantize tiles of one shape by compiled programs: few compilations, bounded memory.

A tensor is cut into tiles of about `TILE` elements; each is copied into float32, solved, encoded and packed by one
compiled function, and its bytes are appended to the result. Only the layout of groups in a tile differs:

    groups        [TILE / group_size, group_size]         one shape a config
    channels      [TILE / bucket, bucket]                 rows padded to a power of two: one shape a bucket
    long groups   [1, TILE]                               a whole tensor, or a channel longer than a tile: it is read
                                                          once for its range, again for each statistic that its
                                                          quantizer needs, and once more for its codes

JAX compiles once a shape, and a program of `mse` takes most of a second to compile: MiniLM alone has six shapes of
matrices. A tensor of a few numbers costs a full tile: at two bits 1.5 ms with `absmax`, 14 with symmetric and 44 with
asymmetric `mse`.

Tiles of a quarter of the size suit small matrices better, and yet took MiniLM to an int2 table at 1.7 times NumPy's
speed instead of 2.5.
"""

from __future__ import annotations

import numpy as np

from aq_jax.codes import Grid
from aq_jax.codes.bits import unpack_codes
from aq_jax.codes.runs import fills_bytes
from aq_jax.config import QuantSpec
from aq_jax.ops.kernels import Kernel
from aq_jax.quantizers import Quantizer
from aq_jax.quantizers.candidates import Candidate, TiledQuantizer
from aq_jax.quantizers.stream import TILE, StreamedGroup
from aq_jax.quantizers.tile_programs import encode_tile, solve_tile, split_numbers
from aq_jax.store import aligned_empty

SMALLEST_BUCKET = 128


class CompiledTiles(TiledQuantizer):
    """The base of both layouts of tiles that compiled programs quantize."""

    def __init__(
        self, flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool, kernel: Kernel
    ) -> None:
        super().__init__(flat, size, spec)
        self.quantizer, self.symmetric, self.kernel = quantizer, symmetric, kernel

    def _append_codes(
        self, candidate: Candidate, position: int, packed: np.ndarray, width: int, valid: int, count: int
    ) -> None:
        """Append `count` codes of a tile whose rows hold `valid` codes and padding up to `width`."""
        bits, stream = self.spec.bits, packed.view(np.uint8).reshape(-1)
        if candidate.codes is not None:
            codes = unpack_codes(stream, bits, stream.size * 8 // bits).reshape(-1, width)[:, :valid]
            candidate.codes[position : position + count] = codes.reshape(-1)[:count]
        elif candidate.data.size:
            if valid < width:
                stream = stream.reshape(-1, width * bits // 8)[:, : -(-valid * bits // 8)].reshape(-1)
            first, taken = position * bits // 8, -(-count * bits // 8)
            candidate.data[first : first + taken] = stream[:taken]


class GroupsPerTile(CompiledTiles):
    """Tiles of many groups."""

    def __init__(
        self, flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool, kernel: Kernel
    ) -> None:
        super().__init__(flat, size, spec, quantizer, symmetric, kernel)
        self.width = size if spec.group_size else max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())
        # A multiple of eight rows: a tile of odd groups ends on a byte.
        self.rows = max(8, TILE // self.width // 8 * 8)
        self.tile = aligned_empty((self.rows, self.width), np.float32)
        self.pads = aligned_empty((self.rows,), np.float32)

    def candidates(self, start: int, stop: int, keep: bool) -> list[Candidate]:
        candidates: list[Candidate] = []
        step = self.rows * self.size
        for first in range(start, stop, step):
            count = self._fill(first, min(first + step, stop))
            answers = solve_tile(self.tile, self.pads, self.spec.coding, self.symmetric, self.quantizer, self.kernel)
            codes, numbers = map(np.asarray, answers)
            # Tiles of groups are a stream as they are; channels must be whole bytes to be cut out of their rows.
            whole = self.width == self.size or fills_bytes(self.size, self.spec.bits)
            candidates = candidates or [self.allocate(start, stop, keep, whole) for _ in codes]
            group = (first - start) // self.size
            for candidate, packed, (scale, zero_point, sound), sums in zip(
                candidates, codes, *split_numbers(numbers), strict=True
            ):
                candidate.scales[group : group + count] = scale[:count]
                candidate.zero_points[group : group + count] = zero_point[:count]
                candidate.add(*sums.tolist())
                candidate.sound &= bool(sound[:count].all())
                self._append_codes(candidate, first - start, packed, self.width, self.size, min(step, stop - first))
        return candidates

    def _fill(self, first: int, stop: int) -> int:
        """Put elements into the tile, one group a row, and count the rows that are groups.

        The tile's memory is used again and again, and JAX may compute on it in place: the results of the last tile
        have been fetched by now.
        """
        values = self.flat[first:stop]
        whole, rest = divmod(values.size, self.size)
        count = whole + (rest > 0)
        with np.errstate(over="ignore"):  # an overflow is an infinity, which is refused by name
            self.tile[:whole, : self.size] = values[: whole * self.size].reshape(whole, self.size)
            if rest:
                self.tile[whole, :rest] = values[whole * self.size :]
        self.tile[:whole, self.size :] = self.tile[:whole, self.size - 1 : self.size]
        if rest:
            self.tile[whole, rest:] = self.tile[whole, rest - 1]
        self.tile[count:] = 0
        self.pads[...] = self.width - self.size
        self.pads[whole:count] = self.width - rest
        return count


class TilesPerGroup(CompiledTiles):
    """Groups of many tiles."""

    def __init__(
        self, flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool, kernel: Kernel
    ) -> None:
        super().__init__(flat, size, spec, quantizer, symmetric, kernel)
        self.grids: dict[int, tuple[Grid, ...]] = {}

    def candidates(self, start: int, stop: int, keep: bool) -> list[Candidate]:
        candidates: list[Candidate] = []
        for first in range(start, stop, self.size):
            group = (first - start) // self.size
            stream = StreamedGroup(self.flat[first : min(first + self.size, stop)])
            for index, grid in enumerate(self._grids_of(first)):
                if group == 0:
                    whole = self.size >= stop - start or fills_bytes(self.size, self.spec.bits)
                    candidates.append(self.allocate(start, stop, keep, whole))
                self._encode(stream, grid, candidates[index], group, first - start)
        return candidates

    def _grids_of(self, first: int) -> tuple[Grid, ...]:
        """Solve the grids of an element's group, once."""
        group = first // self.size
        if group not in self.grids:
            stream = StreamedGroup(self.flat[group * self.size : (group + 1) * self.size])
            with np.errstate(over="ignore"):  # an overflow makes the group unsound
                found = self.quantizer(stream, self.spec.coding, self.symmetric)
            self.grids[group] = tuple(g._replace(sound=g.sound & stream.finite) for g in found)
        return self.grids[group]

    def _encode(self, stream: StreamedGroup, grid: Grid, candidate: Candidate, group: int, position: int) -> None:
        candidate.scales[group], candidate.zero_points[group] = grid.scale[0], grid.zero_point[0]
        candidate.sound &= bool(grid.sound[0])
        for at, tile, pads in stream.tiles():
            answers = encode_tile(tile, pads, grid[:4], self.spec.coding, grid.rounding, self.kernel)
            packed, sums = map(np.asarray, answers)
            candidate.add(*sums.tolist())
            valid = TILE - int(pads[0])
            self._append_codes(candidate, position + at, packed, TILE, valid, valid)
