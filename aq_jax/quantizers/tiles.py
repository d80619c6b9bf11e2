"""Quantize arrays of any size, tile by tile: few compilations, bounded memory.

The native library quantizes groups and channels of up to `TILE` elements where it can (`NativeGroups`), and compiles
nothing. Otherwise a tensor is cut into tiles of about `TILE` elements; each is copied into float32, solved, encoded and
packed by one compiled function, and its bytes are appended to the result. Only the layout of groups in a tile differs:

    groups        [TILE / group_size, group_size]         one shape a config
    channels      [TILE / bucket, bucket]                 rows padded to a power of two: one shape a bucket
    long groups   [1, TILE]                               a whole tensor, or a channel longer than a tile: it is read
                                                          once for its range, again for each statistic that its
                                                          quantizer needs, and once more for its codes

JAX compiles once a shape, and a program of `mse` takes most of a second to compile: MiniLM alone has six shapes of
matrices. Memory is that of a tile and of one tensor's codes. `apply.quantize`, of one array in memory, compiles once a
shape instead, and runs on any device and under any transformation. A tensor of a few numbers costs a full tile: at two
bits 1.5 ms with `absmax`, 14 with symmetric and 44 with asymmetric `mse`.

Tiles of a quarter of the size suit small matrices better, and yet took MiniLM to an int2 table at 1.7 times NumPy's
speed instead of 2.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aq_jax.codes import Code, Grid
from aq_jax.codes.bits import pack_codes, unpack_codes
from aq_jax.codes.rotation import rotate_rows
from aq_jax.codes.runs import fills_bytes
from aq_jax.config import QuantizationConfig, QuantSpec
from aq_jax.errors import AqError
from aq_jax.native import host
from aq_jax.native.host import Recipe
from aq_jax.ops.kernels import Kernel, choose_kernel
from aq_jax.quantizers import Quantizer
from aq_jax.quantizers.eligibility import Refused, refusal, to_float32
from aq_jax.quantizers.entry import recipes_of
from aq_jax.quantizers.lookup import data_free_quantizer
from aq_jax.quantizers.stream import TILE, StreamedGroup
from aq_jax.quantizers.tile_programs import encode_tile, solve_tile, split_numbers
from aq_jax.store import DTYPES, aligned_empty

SMALLEST_BUCKET = 128
NATIVE_TILE, MOST_GROUPS = 1 << 21, 1 << 16
"""The elements and the groups that the native library quantizes in one call."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor, or a piece of one, as the format stores it.

    Args:
        data: The bit stream of the codes, uint8.
        scales: One float32 a group.
        zero_points: One float32 a group; empty where the code has none.
        cosine: The cosine between the weights and their decoded values, in float64 from sums of tiles.
        rel_mse: The squared error divided by the squared weights.
    """

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    cosine: float
    rel_mse: float


def quantize_array(array: np.ndarray, config: QuantizationConfig, name: str) -> Quantized | Refused:
    """Quantize a whole array; see `quantize_pieces`."""
    pieces = quantize_pieces(array, config, name, [(0, array.size)])
    return pieces if isinstance(pieces, Refused) else next(iter(pieces))


def quantize_pieces(
    array: np.ndarray, config: QuantizationConfig, name: str, pieces: list[tuple[int, int]]
) -> Iterator[Quantized] | Refused:
    """Quantize an array piece by piece, as the rows of a table hold it.

    Args:
        array: A floating array of any strides, which is read tile by tile.
        config: The tensor's config (`QuantizationConfig.for_tensor`).
        name: The tensor's name, for errors.
        pieces: Ranges (start, stop) of elements of the flattened array; each begins at a group and a byte.

    A rotated tensor needs memory for a second copy, in float32.

    Returns:
        One result a piece, computed when asked for; or the reason why the tensor is kept as it is.

    Raises:
        AqError: for weights that are not finite or out of range, unless the config says to keep them.
    """
    quantizer = data_free_quantizer(config, name)
    spec = config.spec_for(array.shape, name)
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size == 0:
        count = spec.group_count(array.shape)
        zeros = np.zeros(count if spec.coding.zero_points else 0, np.float32)
        return iter([Quantized(np.empty(0, np.uint8), np.ones(count, np.float32), zeros, 1.0, 0.0)])
    size = spec.group_elements(array.shape)
    kind = GroupsPerTile if size <= TILE and spec.quant_axis == 0 else TilesPerGroup
    rotated = rotate_rows(to_float32(flat), spec.rotation) if spec.rotation else flat
    size = min(size, flat.size) if kind is TilesPerGroup else size
    _, kernel = choose_kernel("quantize", None, size, spec.coding)
    recipes = recipes_of(quantizer, spec.coding, config.symmetric, size)
    if kind is GroupsPerTile and recipes and hasattr(kernel, "solve"):
        tiled: TiledQuantizer = NativeGroups(rotated, size, spec, recipes)
    else:
        tiled = kind(rotated, size, spec, quantizer, config.symmetric, kernel)
    # A refusal and the best candidate are known once the whole tensor has been read. One piece is read once; several
    # are read again for their codes, because not all of them may fit in memory.
    whole = tiled.candidates(0, flat.size, keep=len(pieces) == 1)
    best = min(whole, key=lambda candidate: candidate.sums[3])
    scales = best.scales
    # Groups that look like zeros may hold numbers too small for a float32 scale.
    suspicious = not best.sound or ((scales == 1) & (best.zero_points == 0)).any()
    why = refusal(array, spec, scales, name, best.sound) if suspicious else None
    if why is not None:
        if config.on_nonfinite == "error":
            raise AqError(str(why))
        return why
    if len(pieces) == 1:
        return iter([best.finish(spec.coding)])
    index = whole.index(best)
    return (tiled.candidates(start, stop, keep=True)[index].finish(spec.coding) for start, stop in pieces)


@dataclass(slots=True, eq=False)
class _Candidate:
    """One way of quantizing a range of a tensor, which grows tile by tile."""

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    sums: np.ndarray  # float64: w.w, v.v, w.v, (w - v).(w - v), v being the decoded values
    sound: bool
    codes: np.ndarray | None  # int8, where groups do not end on bytes and the stream is packed at the end
    count: int

    def add(self, sums: np.ndarray) -> None:
        """Add the sums of a tile (see `_error_sums`)."""
        ww, wd, dd, unit = (float(x) for x in sums)
        self.sums += np.array([ww, ww - 2 * wd + dd, ww - wd, dd]) * unit**2

    def finish(self, code: Code) -> Quantized:
        data = self.data
        if self.codes is not None:
            data = pack_codes(self.codes, code.bits)
        elif spare := -self.count * code.bits % 8:
            data[-1] &= 0xFF >> spare
        ww, vv, wv, ee = (float(s) for s in self.sums)
        cosine = wv / math.sqrt(ww * vv) if ww and vv else float(ww == vv)
        zero_points = self.zero_points if code.zero_points else self.zero_points[:0]
        return Quantized(data, self.scales, zero_points, min(cosine, 1.0), ee / ww if ww else 0.0)


class TiledQuantizer:
    """The base of both layouts of tiles: it holds the tensor, and allocates results."""

    def __init__(self, flat: np.ndarray, size: int, spec: QuantSpec) -> None:
        self.flat, self.size, self.spec = flat, size, spec

    def candidates(self, start: int, stop: int, keep: bool) -> list[_Candidate]:
        """Quantize elements `start` to `stop`, which begin with a group; codes are kept if wanted."""
        raise NotImplementedError

    def _allocate(self, start: int, stop: int, keep: bool, whole_bytes: bool) -> _Candidate:
        count = stop - start
        groups = -(-count // self.size)
        return _Candidate(
            data=np.empty(-(-count * self.spec.bits // 8) if keep and whole_bytes else 0, np.uint8),
            scales=np.empty(groups, np.float32),
            zero_points=np.empty(groups, np.float32),
            sums=np.zeros(4),
            sound=True,
            codes=np.empty(count, np.int8) if keep and not whole_bytes else None,
            count=count,
        )


class NativeGroups(TiledQuantizer):
    """Groups that the native library quantizes, many at a time: nothing is compiled, and no tile is filled up."""

    def __init__(self, flat: np.ndarray, size: int, spec: QuantSpec, recipes: tuple[Recipe, ...]) -> None:
        super().__init__(flat, size, spec)
        self.recipes = recipes

    def candidates(self, start: int, stop: int, keep: bool) -> list[_Candidate]:
        bits, whole = self.spec.bits, fills_bytes(self.size, self.spec.bits) or self.size >= stop - start
        found = [self._allocate(start, stop, keep, whole) for _ in self.recipes]
        # A multiple of 8 groups ends on a byte.
        step = max(1, min(NATIVE_TILE // self.size, MOST_GROUPS) // 8) * 8 * self.size
        codes = np.empty(0 if keep else min(step, stop - start), np.int8)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            w = self.flat[first:last]
            w = w if w.dtype in (np.float32, DTYPES["bfloat16"]) else to_float32(w)
            groups = slice((first - start) // self.size, -(-(last - start) // self.size))
            for recipe, each in zip(self.recipes, found, strict=True):
                if not keep:
                    to = codes[: w.size]
                elif each.codes is not None:
                    to = each.codes[first - start : last - start]
                else:
                    to = each.data[(first - start) * bits // 8 : -(-(last - start) * bits // 8)]
                sums, sound = host.quantize(
                    w, self.size, bits, recipe, to, each.scales[groups], each.zero_points[groups]
                )
                each.add(np.array([*sums, 1.0]))
                each.sound &= sound
        return found


class CompiledTiles(TiledQuantizer):
    """The base of both layouts of tiles that compiled programs quantize."""

    def __init__(
        self, flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool, kernel: Kernel
    ) -> None:
        super().__init__(flat, size, spec)
        self.quantizer, self.symmetric, self.kernel = quantizer, symmetric, kernel

    def _append_codes(
        self, candidate: _Candidate, position: int, packed: np.ndarray, width: int, valid: int, count: int
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

    def candidates(self, start: int, stop: int, keep: bool) -> list[_Candidate]:
        candidates: list[_Candidate] = []
        step = self.rows * self.size
        for first in range(start, stop, step):
            count = self._fill(first, min(first + step, stop))
            answers = solve_tile(self.tile, self.pads, self.spec.coding, self.symmetric, self.quantizer, self.kernel)
            codes, numbers = map(np.asarray, answers)
            # Tiles of groups are a stream as they are; channels must be whole bytes to be cut out of their rows.
            whole = self.width == self.size or fills_bytes(self.size, self.spec.bits)
            candidates = candidates or [self._allocate(start, stop, keep, whole) for _ in codes]
            group = (first - start) // self.size
            for candidate, packed, (scale, zero_point, sound), sums in zip(
                candidates, codes, *split_numbers(numbers), strict=True
            ):
                candidate.scales[group : group + count] = scale[:count]
                candidate.zero_points[group : group + count] = zero_point[:count]
                candidate.add(sums)
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

    def candidates(self, start: int, stop: int, keep: bool) -> list[_Candidate]:
        candidates: list[_Candidate] = []
        for first in range(start, stop, self.size):
            group = (first - start) // self.size
            stream = StreamedGroup(self.flat[first : min(first + self.size, stop)])
            for index, grid in enumerate(self._grids_of(first)):
                if group == 0:
                    whole = self.size >= stop - start or fills_bytes(self.size, self.spec.bits)
                    candidates.append(self._allocate(start, stop, keep, whole))
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

    def _encode(self, stream: StreamedGroup, grid: Grid, candidate: _Candidate, group: int, position: int) -> None:
        candidate.scales[group], candidate.zero_points[group] = grid.scale[0], grid.zero_point[0]
        candidate.sound &= bool(grid.sound[0])
        for at, tile, pads in stream.tiles():
            answers = encode_tile(tile, pads, grid[:4], self.spec.coding, grid.rounding, self.kernel)
            packed, sums = map(np.asarray, answers)
            candidate.add(sums)
            valid = TILE - int(pads[0])
            self._append_codes(candidate, position + at, packed, TILE, valid, valid)
