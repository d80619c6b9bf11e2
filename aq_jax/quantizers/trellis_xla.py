"""Choose trellis codes in XLA: the search of the native library (native/src/trellis_encode.cc), for all tiles at once.

It finds codes of the same error, and not the same codes: sums are added in another order, and ties fall otherwise. It
is several times slower, but runs on every device and under every transformation.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from aq_jax.codes.trellis import STATE_BITS, TILE_ROWS, Trellis
from aq_jax.codes.trellis_numpy import level_table
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, AnyArray, round_mantissa

LOOKAHEAD = 16  # rows that a path goes on for, whose choices are dropped
LEAST_WEIGHT = 2.0**-20
LARGEST_RATIO = 2.0**30
NO_SCALE = 2.0**-100  # of rows of zeros: their values are none that matter
STORED_MANTISSA = 7
FAR = 1e30  # the cost of what cannot be


class Steps(NamedTuple):
    """What the steps of a path come near to, and what errors weigh.

    Args:
        x: The targets in levels.
        second: The weight of the second value beside the first.
        ratio: The weight of a step beside that of the next one.
    """

    x: Float[Array, "steps tiles values"]
    second: Float[Array, "steps tiles"]
    ratio: Float[Array, "steps tiles"]


class Paths:
    """The cheapest paths of a code, in many tiles at once (Viterbi).

    What is kept of every step is the least cost of each end: the bits of a state that the next state keeps.
    """

    def __init__(self, code: Trellis) -> None:
        self.bits, self.values = code.step_bits, code.step_rows
        self.new, self.ends = 1 << self.bits, 1 << (STATE_BITS - self.bits)
        self.high = self.ends // self.new
        table = level_table(self.values).astype(np.float32).T
        self.levels = table  # [values, states]
        # A state is (new bits, high bits of its end, low bits of it); one minimum runs over the low bits.
        self.lanes = table.reshape(self.values, self.new, self.high, self.new).transpose(0, 3, 1, 2)

    def find(self, steps: Steps, first: Int[Array, "tiles"], last: Int[Array, "tiles"]) -> Int[Array, "steps tiles"]:
        """Find the states of paths that follow the end `first`, and end in `last`; -1 for any."""
        tiles = first.shape[0]
        ends = jnp.arange(self.ends, dtype=jnp.int32)[None]
        start = jnp.where((first[:, None] == ends) | (first[:, None] < 0), np.float32(0), np.float32(FAR))

        def advance(costs: Array, step: Steps) -> tuple[Array, Array]:
            before = costs.reshape(tiles, self.high, self.new).transpose(2, 0, 1)[:, :, None]
            after = jnp.min(before + self._distances(self.lanes[:, :, None], step, (None, slice(None), None, None)), 0)
            return after.reshape(tiles, self.ends) * step.ratio[:, None], costs

        costs, history = lax.scan(advance, start, steps)
        final = jnp.where(last < 0, jnp.argmin(costs, axis=1).astype(jnp.int32), last)

        def retreat(end: Array, given: tuple[Array, Steps]) -> tuple[Array, Array]:
            costs, step = given
            new, high = end // self.high, end % self.high
            ends = high[:, None] * self.new + jnp.arange(self.new, dtype=jnp.int32)[None]
            states = (new[:, None] << (STATE_BITS - self.bits)) | ends
            sums = jnp.take_along_axis(costs, ends, axis=1)
            sums += self._distances(jnp.asarray(self.levels)[:, states], step, (slice(None), None))
            state = jnp.take_along_axis(states, jnp.argmin(sums, axis=1)[:, None], axis=1)[:, 0]
            return state & (self.ends - 1), state

        return lax.scan(retreat, final, (history, steps), reverse=True)[1]

    def _distances(self, levels: Array | np.ndarray, step: Steps, at: tuple[object, ...]) -> Array:
        found = (step.x[:, 0][at] - levels[0]) ** 2
        if self.values == 2:
            found += (step.x[:, 1][at] - levels[1]) ** 2 * step.second[at]
        return found


@partial(jax.jit, static_argnames=("code", "rounds"))
def encode_tiles(
    w: Float[Array, "tiles rows columns"],
    hessian: tuple[Float[AnyArray, "columns columns"], Float[AnyArray, "columns columns"]] | None,
    start: Float[Array, ""] | float,
    code: Trellis,
    rounds: int,
) -> tuple[UInt8[Array, "tiles bytes"], Float[Array, "tiles rows"], Bool[Array, ""]]:
    """Choose the codes of tiles of equally many rows; see `trellis.encode_matrix`.

    Returns:
        The bytes of each tile, the scale of each row, and whether all weights are finite and all scales in bounds.
    """
    return _Tiles(w, hessian, start, code).encode(rounds)


class _Tiles:
    def __init__(
        self,
        w: Array,
        hessian: tuple[AnyArray, AnyArray] | None,
        start: Array | float,
        code: Trellis,
    ) -> None:
        self.paths, self.code = Paths(code), code
        self.hessian = None if hessian is None else (jnp.asarray(hessian[0]), jnp.asarray(hessian[1]))
        self.tiles, self.rows, self.columns = w.shape
        self.each = self.rows // code.step_rows  # steps of a column
        self.count = self.each * self.columns
        self.wide = min(self.columns, -(-LOOKAHEAD // self.each))  # columns of a window
        finite = jnp.isfinite(w)
        largest = jnp.max(jnp.where(finite, jnp.abs(w), 0.0), axis=2)
        blank = largest < SCALE_MIN
        self.unit = jnp.where(blank, 1.0, round_mantissa(jnp.clip(largest, SCALE_MIN, SCALE_MAX), 0))
        held = jnp.where(jnp.isnan(w), 0.0, jnp.clip(w, -largest[..., None], largest[..., None]))
        self.w = jnp.where(blank[..., None], 0.0, held / self.unit[..., None]).swapaxes(1, 2)  # [tiles, columns, rows]
        self.finite, self.blank = jnp.all(finite), blank
        size = jnp.sqrt(jnp.mean(self.w**2, axis=1))
        self.scale = jnp.where(blank, NO_SCALE, round_mantissa(jnp.clip(start * size, NO_SCALE, SCALE_MAX), 7))

    def encode(self, rounds: int) -> tuple[Array, Array, Array]:
        states = self._follow_columns()
        states = self._fit(states)
        if self.hessian is None or self.wide == 1:
            for round_ in range(rounds):
                states = self._fit(self._find_windows(states, self._half() if round_ % 2 == 0 else 0))
        whole = jnp.clip(self.scale * self.unit, SCALE_MIN, SCALE_MAX)
        bounded = jnp.all((whole > SCALE_MIN) & (whole < SCALE_MAX))
        return self._pack(states), jnp.where(self.blank, NO_SCALE, whole), self.finite & bounded

    def _half(self) -> int:
        return 0 if self.columns == 1 else self.wide * self.rows // 2 // self.code.step_rows

    def _levels(self, states: Int[Array, "tiles steps"]) -> Float[Array, "tiles columns rows"]:
        found = jnp.asarray(self.paths.levels)[:, states]  # [values, tiles, steps]
        return jnp.moveaxis(found, 0, -1).reshape(self.tiles, self.columns, self.rows)

    def _steps(self, targets: Array, column_weight: Array, start: Array | int, count: int) -> Steps:
        """Take steps from targets [tiles, columns, rows] in weights, a ring, given what errors of columns weigh."""
        unit = self.unit / jnp.max(self.unit, axis=1, keepdims=True)
        weight = jnp.square(self.scale * jnp.where(self.blank, 0.0, unit))
        weight /= jnp.maximum(jnp.max(weight, axis=1, keepdims=True), 1e-30)
        weight = jnp.maximum(weight, LEAST_WEIGHT).reshape(self.tiles, self.each, -1)
        at = (start + jnp.arange(count, dtype=jnp.int32)) % self.count
        column, step = at // self.each, at % self.each
        x = (targets / self.scale[:, None]).reshape(self.tiles, self.count, -1)[:, at]
        own = weight[:, step, 0] * column_weight[column][None]
        ratio = jnp.clip(own / jnp.roll(own, -1, axis=1), 1 / LARGEST_RATIO, LARGEST_RATIO).at[:, -1].set(1.0)
        second = jnp.clip(weight[:, step, -1] / weight[:, step, 0], LEAST_WEIGHT, 1 / LEAST_WEIGHT)
        return Steps(x.swapaxes(0, 1), second.T, ratio.T)

    def _follow_columns(self) -> Int[Array, "tiles steps"]:
        """Choose codes column by column; errors are made up for by the columns that follow."""
        size, ahead = self.wide * self.each, LOOKAHEAD // self.code.step_rows
        windows = max(self.columns // self.wide, 1)  # the last one has the columns that are left over
        nowhere = jnp.full(self.tiles, -1, jnp.int32)
        ones = jnp.ones(self.columns, jnp.float32)
        column_weight = ones if self.hessian is None else 1 / jnp.square(jnp.diagonal(self.hessian[1]))

        def window(k: Array | int, state: tuple[Array, Array], columns: int, last: Array | None) -> tuple[Array, Array]:
            left, states = state
            start, count = k * size, columns * self.each
            steps = self._steps(left, column_weight, start, count + (0 if last is not None else ahead))
            before = states[:, (start - 1) % self.count] >> self.paths.bits
            found = self.paths.find(steps, jnp.where(start > 0, before, -1), nowhere if last is None else last)
            states = lax.dynamic_update_slice_in_dim(states, found[:count].T, start, 1)
            return (left if self.hessian is None else self._feed_back(left, states, k * self.wide, columns)), states

        state = (self.w, jnp.zeros((self.tiles, self.count), jnp.int32))
        if windows == 1:  # a ring of one window: it ends where it began
            end = window(0, state, self.columns, nowhere)[1][:, -1] >> self.paths.bits
            steps = self._steps(self.w, column_weight, 0, self.count)
            return self.paths.find(steps, end, end).T
        state = lax.fori_loop(0, windows - 1, lambda k, state: window(k, state, self.wide, None), state)
        closing = state[1][:, 0] & (self.paths.ends - 1)
        return window(windows - 1, state, self.columns - (windows - 1) * self.wide, closing)[1]

    def _feed_back(self, left: Array, states: Array, first: Array | int, columns: int) -> Array:
        """Take the errors of some columns from all that follow."""
        assert self.hessian is not None  # noqa: S101
        u, levels = self.hessian[1], self._levels(states)

        def column(i: Array, left: Array) -> Array:
            c = first + i
            row = lax.dynamic_index_in_dim(u, c, keepdims=False)
            value = lax.dynamic_index_in_dim(levels, c, 1, keepdims=False) * self.scale
            error = (lax.dynamic_index_in_dim(left, c, 1, keepdims=False) - value) / row[c]
            later = jnp.where(jnp.arange(self.columns) > c, row, 0.0)
            return left - later[None, :, None] * error[:, None]

        return lax.fori_loop(0, columns, column, left)

    def _fit(self, states: Array) -> Array:
        """Fit each row's scale to its codes, by least squares; the codes stay."""
        levels = self._levels(states)
        wanted, made = (self.w, levels) if self.hessian is None else (self._times(self.w), self._times(levels))
        along, own = jnp.sum(levels * wanted, axis=1), jnp.sum(levels * made, axis=1)
        good = (along > 0) & (own > 0)
        fitted = round_mantissa(jnp.clip(along / jnp.where(own > 0, own, 1.0), SCALE_MIN, SCALE_MAX), STORED_MANTISSA)
        self.scale = jnp.where(good & ~self.blank, fitted, self.scale)
        return states

    def _times(self, x: Float[Array, "tiles columns rows"]) -> Float[Array, "tiles columns rows"]:
        assert self.hessian is not None  # noqa: S101
        return jnp.einsum("kc,tcr->tkr", self.hessian[0], x, precision="highest")

    def _find_windows(self, states: Array, offset: int) -> Int[Array, "tiles steps"]:
        """Find windows of a column's length again, given all others; no such step makes the error larger."""
        size = self.wide * self.each
        whole, rest = divmod(self.count, size)
        diagonal = jnp.ones(self.columns, jnp.float32) if self.hessian is None else jnp.diagonal(self.hessian[0])
        wanted = self.w if self.hessian is None else self._times(self.w)
        made = jnp.zeros_like(self.w) if self.hessian is None else self._times(self._levels(states))

        def window(k: Array | int, state: tuple[Array, Array], count: int) -> tuple[Array, Array]:
            states, made = state
            start = k * size + offset
            if self.hessian is None:
                targets = wanted
            else:
                own = self._levels(states) * self.scale[:, None]
                targets = own + (wanted - made * self.scale[:, None]) / diagonal[None, :, None]
            steps = self._steps(targets, diagonal, start, count)
            at = (start + jnp.arange(count, dtype=jnp.int32)) % self.count
            first = states[:, (start - 1) % self.count] >> self.paths.bits
            last = states[:, (start + count) % self.count] & (self.paths.ends - 1)
            found = states.at[:, at].set(self.paths.find(steps, first, last).T)
            if self.hessian is not None:
                made += self._times_changed(self._levels(found) - self._levels(states), at[0] // self.each)
            return found, made

        state = lax.fori_loop(0, whole, lambda k, state: window(k, state, size), (states, made))
        return (window(whole, state, rest) if rest else state)[0]

    def _times_changed(self, change: Array, first: Array) -> Array:
        """Multiply by the Hessian what changed in a column and the next."""
        assert self.hessian is not None  # noqa: S101
        two = jnp.stack([first, (first + 1) % self.columns])
        two = two if self.columns > 1 else two[:1]
        return jnp.einsum("ck,tcr->tkr", self.hessian[0][two], change[:, two], precision="highest")

    def _pack(self, states: Int[Array, "tiles steps"]) -> UInt8[Array, "tiles bytes"]:
        """Write the bits that each step shifts in; the stream begins with the first state."""
        bits = self.paths.bits
        new = (states >> (STATE_BITS - bits))[..., None] >> jnp.arange(bits, dtype=jnp.int32)[None, None] & 1
        stream = jnp.roll(new.reshape(self.tiles, -1), STATE_BITS - bits, axis=1)
        stream = jnp.pad(stream, ((0, 0), (0, -stream.shape[1] % 8))).reshape(self.tiles, -1, 8)
        return jnp.sum(stream << jnp.arange(8, dtype=jnp.int32)[None, None], axis=2).astype(jnp.uint8)


def encode(
    w: Float[Array, "*lead rows columns"],
    hessian: tuple[AnyArray, AnyArray] | None,
    start: float,
    code: Trellis,
    rounds: int,
) -> tuple[UInt8[Array, "*lead bytes"], Float[Array, "*lead rows"], Bool[Array, ""]]:
    """Choose the codes of matrices, tile by tile, as a QTensor holds them; see `encode_tiles`."""
    *lead, rows, columns = w.shape
    flat = w.reshape(-1, rows, columns).astype(jnp.float32)
    whole, parts = rows // TILE_ROWS * TILE_ROWS, []
    for first, last, size in ((0, whole, TILE_ROWS), (whole, rows, rows - whole)):
        if last > first:
            tiles = flat[:, first:last].reshape(-1, size, columns)
            parts.append(encode_tiles(tiles, hessian, start, code, rounds))
    data = jnp.concatenate([each[0].reshape(len(flat), -1) for each in parts], axis=1)
    scale = jnp.concatenate([each[1].reshape(len(flat), -1) for each in parts], axis=1)
    sound = jnp.all(jnp.stack([each[2] for each in parts]))
    return data.reshape(*lead, -1), scale.reshape(*lead, rows), sound
