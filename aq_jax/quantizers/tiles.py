"""Quantize arrays of any size through tiles of one shape: few compilations, bounded memory.

A tensor is cut into tiles of about `TILE` elements; each is copied into float32, solved, encoded and packed by one
compiled function, and its bytes are appended to the result. What differs is only how groups lie in a tile:

    groups        [TILE / group_size, group_size]         one shape a config
    channels      [TILE / bucket, bucket]                 rows filled up to a power of two: one shape a bucket
    long groups   [1, TILE]                               a whole tensor, or a channel longer than a tile: the group is
                                                          read once for its range, again for each question that its
                                                          quantizer asks, and once more for its codes

JAX compiles once a shape, and a program of `mse` takes most of a second to compile: MiniLM alone has six shapes of
matrices. Memory is that of a tile and of one tensor's codes. `apply.quantize`, of one array in memory, compiles once a
shape instead, and runs on any device and under any transformation. A tensor of a few numbers costs a full tile: at two
bits 1.5 ms with `absmax`, 14 with symmetric and 44 with asymmetric `mse`.

Measured, and decided by it: a tile gives two arrays, codes and all numbers in one, because fetching an array costs 25
microseconds. Tiles of a quarter of the size suit small matrices better, and yet took MiniLM to an int2 table at 1.7
times NumPy's speed instead of 2.5. A mask over fillings in the sums behind `cosine` doubled a tile's time; fillings are
copies of their row's last element, so they are counted and taken away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from aq_jax.codes import Code, Grid, bits_jax
from aq_jax.codes.bits import pack_codes, unpack_codes
from aq_jax.codes.entry import Rounding
from aq_jax.codes.rotation import rotate_rows
from aq_jax.codes.runs import fills_bytes
from aq_jax.config import QuantizationConfig, QuantSpec
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, AnyArray, round_mantissa
from aq_jax.errors import AqError
from aq_jax.ops.kernels import Kernel, choose
from aq_jax.quantizers import Quantizer
from aq_jax.quantizers.lookup import without_inputs
from aq_jax.quantizers.measure import Groups
from aq_jax.quantizers.screen import Refused, float32, refusal
from aq_jax.quantizers.stream import TILE, Stream
from aq_jax.store import aligned_empty

SMALLEST_BUCKET = 128


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor, or a piece of one, as the format stores it.

    Args:
        data: uint8, the bit stream of the codes.
        scales: float32, one a group; zero_points likewise, none where the code has none.
        cosine: between the weights and what the codes stand for, computed in float64 from sums of tiles.
        rel_mse: squared error over squared weights.
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
        array: floating, of any strides; read tile by tile.
        config: of this tensor (`QuantizationConfig.for_tensor`).
        name: for errors.
        pieces: (start, stop) in elements of the flattened array, each cut where a group and a byte begin.

    A rotated tensor is in memory once more, in float32.

    Returns:
        One result a piece, computed when asked for; or the reason why the tensor is kept as it is.

    Raises:
        AqError: for weights that are not finite or out of range, unless the config says to keep them.
    """
    quantizer = without_inputs(config, name)
    spec = config.spec_for(array.shape, name)
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size == 0:
        count = spec.group_count(array.shape)
        zeros = np.zeros(count if spec.coding.zero_points else 0, np.float32)
        return iter([Quantized(np.empty(0, np.uint8), np.ones(count, np.float32), zeros, 1.0, 0.0)])
    size = spec.group_elements(array.shape)
    road = _Short if size <= TILE and spec.quant_axis == 0 else _Long
    turned = rotate_rows(float32(flat), spec.rotation) if spec.rotation else flat
    run = road(turned, min(size, flat.size) if road is _Long else size, spec, quantizer, config.symmetric)
    # What a tensor is refused for, and which candidate it takes, is known once all of it has been read. One piece
    # is read once; of several, each is read again for its codes, because not all of them may fit in memory.
    whole = run.candidates(0, flat.size, keep=len(pieces) == 1)
    best = min(whole, key=lambda candidate: candidate.sums[3])
    scales = best.scales
    # Groups that were taken for zeros may hold numbers too small for a float32 scale.
    suspicious = not best.sound or ((scales == 1) & (best.zero_points == 0)).any()
    why = refusal(array, spec, scales, name, best.sound) if suspicious else None
    if why is not None:
        if config.on_nonfinite == "error":
            raise AqError(str(why))
        return why
    if len(pieces) == 1:
        return iter([best.finish(spec.coding)])
    index = whole.index(best)
    return (run.candidates(start, stop, keep=True)[index].finish(spec.coding) for start, stop in pieces)


@dataclass(slots=True, eq=False)
class _Candidate:
    """One way of quantizing a stretch of a tensor, as it grows tile by tile."""

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    sums: np.ndarray  # float64: w.w, v.v, w.v, (w - v).(w - v), v being what the codes stand for
    sound: bool
    codes: np.ndarray | None  # int8, where groups do not end on bytes and the stream is packed at the end
    count: int

    def add(self, sums: np.ndarray) -> None:
        """Take in the sums of a tile (see `_products`)."""
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


class _Road:
    """What both kinds of tiles share: the tensor and room for results."""

    def __init__(self, flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool) -> None:
        self.flat, self.size, self.spec = flat, size, spec
        self.quantizer, self.symmetric = quantizer, symmetric
        _, self.kernel = choose("quantize", None, size, spec.coding)

    def _room(self, start: int, stop: int, keep: bool, whole_bytes: bool) -> _Candidate:
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

    def _put(self, room: _Candidate, position: int, packed: np.ndarray, width: int, valid: int, count: int) -> None:
        """Append `count` codes of a tile whose rows hold `valid` codes and fillings up to `width`."""
        bits, stream = self.spec.bits, packed.view(np.uint8).reshape(-1)
        if room.codes is not None:
            codes = unpack_codes(stream, bits, stream.size * 8 // bits).reshape(-1, width)[:, :valid]
            room.codes[position : position + count] = codes.reshape(-1)[:count]
        elif room.data.size:
            if valid < width:
                stream = stream.reshape(-1, width * bits // 8)[:, : -(-valid * bits // 8)].reshape(-1)
            first, taken = position * bits // 8, -(-count * bits // 8)
            room.data[first : first + taken] = stream[:taken]


class _Short(_Road):
    """Many groups a tile."""

    def __init__(self, flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool) -> None:
        super().__init__(flat, size, spec, quantizer, symmetric)
        self.width = size if spec.group_size else max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())
        # A multiple of eight rows: a tile of odd groups ends on a byte.
        self.rows = max(8, TILE // self.width // 8 * 8)
        self.tile = aligned_empty((self.rows, self.width), np.float32)
        self.pads = aligned_empty((self.rows,), np.float32)

    def candidates(self, start: int, stop: int, keep: bool) -> list[_Candidate]:
        rooms: list[_Candidate] = []
        step = self.rows * self.size
        for first in range(start, stop, step):
            count = self._fill(first, min(first + step, stop))
            answers = _solve_tile(self.tile, self.pads, self.spec.coding, self.symmetric, self.quantizer, self.kernel)
            codes, numbers = map(np.asarray, answers)
            # Tiles of groups are a stream as they are; channels must be whole bytes to be cut out of their rows.
            whole = self.width == self.size or fills_bytes(self.size, self.spec.bits)
            rooms = rooms or [self._room(start, stop, keep, whole) for _ in codes]
            group = (first - start) // self.size
            for room, packed, (scale, zero_point, sound), sums in zip(rooms, codes, *_numbers(numbers), strict=True):
                room.scales[group : group + count] = scale[:count]
                room.zero_points[group : group + count] = zero_point[:count]
                room.add(sums)
                room.sound &= bool(sound[:count].all())
                self._put(room, first - start, packed, self.width, self.size, min(step, stop - first))
        return rooms

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


class _Long(_Road):
    """One group over many tiles."""

    def __init__(self, flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool) -> None:
        super().__init__(flat, size, spec, quantizer, symmetric)
        self.grids: dict[int, tuple[Grid, ...]] = {}

    def candidates(self, start: int, stop: int, keep: bool) -> list[_Candidate]:
        rooms: list[_Candidate] = []
        for first in range(start, stop, self.size):
            group = (first - start) // self.size
            stream = Stream(self.flat[first : min(first + self.size, stop)])
            for index, grid in enumerate(self._solved(first)):
                if group == 0:
                    whole = self.size >= stop - start or fills_bytes(self.size, self.spec.bits)
                    rooms.append(self._room(start, stop, keep, whole))
                self._encode(stream, grid, rooms[index], group, first - start)
        return rooms

    def _solved(self, first: int) -> tuple[Grid, ...]:
        """The grids of the group that an element is in, solved once."""
        group = first // self.size
        if group not in self.grids:
            stream = Stream(self.flat[group * self.size : (group + 1) * self.size])
            with np.errstate(over="ignore"):  # an overflow makes the group unsound
                found = self.quantizer(stream, self.spec.coding, self.symmetric)
            self.grids[group] = tuple(g._replace(sound=g.sound & stream.finite) for g in found)
        return self.grids[group]

    def _encode(self, stream: Stream, grid: Grid, room: _Candidate, group: int, position: int) -> None:
        room.scales[group], room.zero_points[group] = grid.scale[0], grid.zero_point[0]
        room.sound &= bool(grid.sound[0])
        for at, tile, pads in stream.tiles():
            answers = _encode_tile(tile, pads, grid[:4], self.spec.coding, grid.rounding, self.kernel)
            packed, sums = map(np.asarray, answers)
            room.add(sums)
            valid = TILE - int(pads[0])
            self._put(room, position + at, packed, TILE, valid, valid)


@partial(jax.jit, static_argnames=("code", "symmetric", "quantizer", "kernel"))
def _solve_tile(
    w: Float[AnyArray, "groups size"],
    pads: Float[AnyArray, "groups"],
    code: Code,
    symmetric: bool,
    quantizer: Any,
    kernel: Kernel,
) -> tuple[Shaped[Array, "candidates bytes"], Float[Array, "candidates numbers"]]:
    """Codes, and all numbers in one array: to fetch an array costs as much as to compute a tenth of the tile."""
    w = jnp.asarray(w)  # which is a NumPy array where nothing is compiled (jax_disable_jit)
    groups = Groups(w, jnp.asarray(pads))
    codes, numbers = [], []
    for grid in quantizer(groups, code, symmetric):
        q = jnp.round(kernel.run(w, grid, code))
        sound = (grid.sound & groups.finite).astype(jnp.float32)
        codes.append(_packed(q, code))
        numbers.append(jnp.concatenate([grid.scale, grid.zero_point, sound, _products(groups, q, grid, code)]))
    return jnp.stack(codes), jnp.stack(numbers)


def _numbers(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each candidate: (scale, zero_point, sound) of each group, and the sums of the tile."""
    rows = (numbers.shape[1] - 4) // 3
    return numbers[:, :-4].reshape(-1, 3, rows), numbers[:, -4:]


@partial(jax.jit, static_argnames=("code", "rounding", "kernel"))
def _encode_tile(
    w: Float[AnyArray, "1 size"],
    pads: Float[AnyArray, "1"],
    grid: tuple[Any, Any, Any, Any],
    code: Code,
    rounding: Rounding,
    kernel: Kernel,
) -> tuple[Shaped[Array, "bytes"], Float[Array, "4"]]:
    w, whole = jnp.asarray(w), Grid(*(jnp.asarray(each) for each in grid), rounding=rounding)
    q = jnp.round(kernel.run(w, whole, code))
    return _packed(q, code), _products(Groups(w, jnp.asarray(pads)), q, whole, code)


def _packed(codes: Float[Array, "groups size"], code: Code) -> Array:
    """The bit stream of a tile. Rows of odd lengths run on into each other, as they do in the tensor."""
    return bits_jax.pack(codes.reshape(-1), code.bits)


def _products(groups: Groups, codes: Array, grid: Grid, code: Code) -> Float[Array, "4"]:
    """w.w, w.d, d.d over a tile, d being what quantization changes, both divided by the last number, a power of two.

    From these three nothing is lost where d is small beside w.
    """
    top = jnp.max(jnp.maximum(groups.hi, -groups.lo))
    unit = round_mantissa(jnp.clip(top, SCALE_MIN, SCALE_MAX), 0)
    w = groups.w / unit
    d = (groups.w - code.decode(codes, grid.scale, grid.zero_point)) / unit
    rows, size = w.shape
    if rows == 1:  # fillings may outnumber elements, so that to take their share away would leave nothing exact
        real = jnp.arange(size, dtype=jnp.float32)[None] < size - groups.pads[:, None]
        w, d = jnp.where(real, w, 0.0), jnp.where(real, d, 0.0)
        return jnp.stack([jnp.vdot(w, w), jnp.vdot(w, d), jnp.vdot(d, d), unit])

    def dot(a: Array, b: Array) -> Array:
        # Fillings are equal to the last element of their row; a mask takes as long as everything else in a tile.
        return jnp.vdot(a, b) - jnp.vdot(groups.pads, a[:, -1] * b[:, -1])

    return jnp.stack([dot(w, w), dot(w, d), dot(d, d), unit])
