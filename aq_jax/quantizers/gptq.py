"""Choose codes so that a layer's outputs change least: GPTQ, then coordinate descent on the same objective.

In a layer y = x W^T with the Hessian H = E[x^T x] of its inputs, row w of W becomes v, and (v - w) H (v - w)^T is the
expected square of the change of its output. Three steps lower it, each for all rows at once:

    grids     those of `mse`, which looks at the weights alone
    gptq      column by column, the error of a code is made up for by the columns that follow (E. Frantar et al.,
              arXiv:2210.17323): v_j = round(w_j), w -= (w_j - v_j) / U_jj * U_j, where H^-1 = U^T U; columns of large
              inputs first, under groups that stay where they are
    refine    in turn: scales and zero points by least squares under H, given the codes; and each code, given all
              others, at its best level. A row keeps what is best, so that no round makes it worse.

All loops are `fori_loop`s over blocks of columns: the program does not grow with the matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from aq_jax.codes import Affine, Code, check_uniform
from aq_jax.codes.affine import code_range
from aq_jax.codes.rotation_jax import rotate
from aq_jax.config import QuantSpec
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, round_mantissa
from aq_jax.core.qtensor import QTensor, assemble_qtensor
from aq_jax.errors import ConfigError
from aq_jax.quantizers.entry import Calibrated
from aq_jax.quantizers.hessian import PreparedHessian, prepare_hessian
from aq_jax.quantizers.mse import MSE, STORED_MANTISSA
from aq_jax.quantizers.statistics import Groups
from aq_jax.quantizers.trellis import ROUNDS as TRELLIS_ROUNDS
from aq_jax.quantizers.trellis import solve_matrix

BLOCK_COLUMNS = 128  # solved one by one before their errors reach all others, in one product
ROUNDS = 4
TILE_ROWS = 256  # in a tile of `gptq_tiled`
LARGEST_ZERO_POINT = 2.0**8


@dataclass(frozen=True)
class GPTQ(Calibrated):
    """GPTQ and its refinement, under the second moment of a layer's inputs or of an embedding's gradients."""

    name = "gptq"

    def supports(self, code: Code) -> bool:
        return code.uniform or code.matrices

    def check(self, spec: QuantSpec, shape: tuple[int, ...], where: str) -> None:
        check_gptq(spec, shape, where)

    def prepare_hessian(self, hessian: Float[Array, "inputs inputs"], damping: float, rotation: int) -> PreparedHessian:
        return prepare_hessian(hessian, damping, rotation)

    def solve(
        self, w: np.ndarray, hessian: PreparedHessian, spec: QuantSpec, symmetric: bool, quick: bool = False
    ) -> QTensor:
        if spec.coding.matrices:
            return solve_matrix(w, hessian, spec, rounds=1 if quick else TRELLIS_ROUNDS)
        return gptq_tiled(w, hessian, spec, symmetric, rounds=1 if quick else ROUNDS)


@partial(jax.jit, static_argnames=("spec", "symmetric"))
def gptq(
    w: Float[Array, "rows inputs"],
    hessian: PreparedHessian,
    spec: QuantSpec,
    symmetric: bool,
    rounds: int | Int[Array, ""] = ROUNDS,
    zero_point: Float[Array, ""] | float = math.nan,
) -> QTensor:
    """Quantize a weight so that its outputs change least under a Hessian.

    Args:
        w: The weight [outputs, inputs]; rows share nothing but the zero point of symmetric grids.
        hessian: The prepared Hessian of the layer's inputs, with the rotation of `spec`.
        spec: The numerics: channels, or groups that divide a row.
        symmetric: Whether there is one constant zero point.
        rounds: The rounds of refinement; 0 is GPTQ alone.
        zero_point: The zero point of a symmetric grid, 0 or -0.5; NaN takes the one that fits the weights better.

    Raises:
        ConfigError: for one grid a tensor, and groups that cross rows.

    >>> w = jax.random.normal(jax.random.key(0), (4, 8))
    >>> gptq(w, prepare_hessian(jnp.eye(8)), QuantSpec(2, group_size=8), symmetric=True)
    QTensor(int2[4, 8], QuantSpec(bits=2, per_channel=False, group_size=8, rotation=0))
    """
    check_gptq(spec, w.shape, "gptq")
    shape, bits = w.shape, spec.bits
    w = w.astype(jnp.float32)
    w = rotate(w, spec.rotation) if spec.rotation else w
    size = spec.group_elements(shape)
    scale, zeros = _starting_grids(w.reshape(shape[0], -1, size), bits, symmetric, jnp.asarray(zero_point, jnp.float32))
    w = jnp.where(jnp.isfinite(w), w, 0.0)
    codes = _gptq(w, hessian, scale, zeros, bits)
    error = _error(w, codes, scale, zeros, hessian.h)

    def refined(_: int, best: tuple[Array, ...]) -> tuple[Array, ...]:
        codes, scale, zeros, error = best
        new = _least_squares(w, codes, scale, zeros, hessian.h, symmetric)
        moved = _coordinate_descent(w, codes, *new, hessian.h, bits)
        after = _error(w, moved, *new, hessian.h)
        better = after < error
        keep = partial(jnp.where, better[:, None])
        return keep(moved, codes), keep(new[0], scale), keep(new[1], zeros), jnp.where(better, after, error)

    codes, scale, zeros, _ = lax.fori_loop(0, rounds, refined, (codes, scale, zeros, error))
    return assemble_qtensor(codes.reshape(*scale.shape, size), scale, zeros, shape, spec)


def gptq_tiled(
    w: Float[np.ndarray, "rows inputs"],
    hessian: PreparedHessian,
    spec: QuantSpec,
    symmetric: bool,
    rounds: int = ROUNDS,
) -> QTensor:
    """Run `gptq` by tiles of TILE_ROWS rows, so that all matrices with rows of one length share one program.

    A short last tile is padded with its own rows. The zero point of a symmetric grid is that of the first tile.

    Returns:
        A QTensor of NumPy leaves.
    """
    tiles = [
        np.resize(w[start : start + TILE_ROWS], (TILE_ROWS, w.shape[1])) for start in range(0, w.shape[0], TILE_ROWS)
    ]

    def solve(tile: np.ndarray, zero_point: float = math.nan) -> QTensor:
        return jax.device_get(gptq(tile, hessian, spec, symmetric, rounds, np.float32(zero_point)))

    first = solve(tiles[0])
    zero_point = float(first.zero_point.min()) if symmetric else math.nan  # groups of zeros have 0, others not
    rest = [solve(tile, zero_point) for tile in tiles[1:]]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(w)], first, *rest)


def check_gptq(spec: QuantSpec, shape: tuple[int, ...], where: str) -> None:
    """Refuse a weight that `gptq` cannot solve: it takes rows one by one.

    Raises:
        ConfigError: naming `where`.
    """
    if not spec.coding.matrices:
        check_uniform(spec.coding, f"{where}: solver = 'gptq'")
    size = spec.group_elements(shape)
    if len(shape) != 2 or spec.quant_axis < 0 or 0 in shape or shape[-1] % size:
        grids = f"groups of {size}" if spec.group_size else "channels" if spec.per_channel else "one grid a tensor"
        raise ConfigError(
            f"{where}: solver = 'gptq' takes matrices with channels, or groups that divide a row; found "
            f"{grids} of shape {list(shape)}; choose another group_size, or solver = 'mse'"
        )


def _starting_grids(
    groups: Float[Array, "rows groups size"], bits: int, symmetric: bool, zero_point: Float[Array, ""]
) -> tuple[Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """Find each group's scale and zero point; of two symmetric grids, the one that was asked for, or fits better."""
    measured = Groups(groups, jnp.zeros(groups.shape[:-1], jnp.float32))
    grids = MSE()(measured, Affine(bits), symmetric)
    errors = jnp.stack([jnp.sum(measured.squared_error(grid, Affine(bits))) for grid in grids])
    asked = (zero_point < 0).astype(jnp.int32)
    best = jnp.where(jnp.isnan(zero_point), jnp.argmin(errors).astype(jnp.int32), asked) if symmetric else 0
    scale, zero_point = (jnp.stack([getattr(grid, field) for grid in grids])[best] for field in ("scale", "zero_point"))
    return scale, zero_point


def _nearest_level(x: Array, scale: Array, zero_point: Array, bits: int) -> Array:
    low, high = code_range(bits)
    return jnp.clip(jnp.round(x / scale + zero_point), low, high)


def _per_element(grid: Float[Array, "rows groups"], inputs: int) -> Float[Array, "inputs rows"]:
    """Repeat a grid's numbers for each element, columns first: the loops go over columns."""
    return jnp.repeat(grid.T, inputs // grid.shape[1], axis=0)


def _blocks(inputs: int) -> tuple[int, int]:
    """Return (columns of a block, columns missing in the last one)."""
    size = min(BLOCK_COLUMNS, inputs)
    return size, -inputs % size


def _padding_identity(inputs: int, missing: int) -> Float[Array, "columns columns"]:
    """Make the identity of the columns that pad the last block."""
    return jnp.diag((jnp.arange(inputs + missing) >= inputs).astype(jnp.float32))


def _gptq(
    w: Array, hessian: PreparedHessian, scale: Array, zero_point: Array, bits: int
) -> Float[Array, "rows inputs"]:
    inputs = w.shape[1]
    size, missing = _blocks(inputs)
    order = hessian.order
    # Columns that pad the last block have no weight, and touch no other.
    pad = ((0, missing), (0, 0))
    left, s, z = (
        jnp.pad(a[order], pad, constant_values=1)
        for a in (w.T, _per_element(scale, inputs), _per_element(zero_point, inputs))
    )
    u = jnp.pad(hessian.u, (0, missing)) + _padding_identity(inputs, missing)

    def block(k: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, codes = state
        start = k * size
        here = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        rows_of_u, sb, zb = here(u), here(s), here(z)
        square = here(rows_of_u, axis=1)

        def column(j: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            w, codes, errors = state
            q = _nearest_level(w[j], sb[j], zb[j], bits)
            error = (w[j] - (q - zb[j]) * sb[j]) / square[j, j]
            return w - square[j][:, None] * error[None], codes.at[j].set(q), errors.at[j].set(error)

        wb = here(left)
        _, qb, errors = lax.fori_loop(0, size, column, (wb, wb, wb))
        # u is upper triangular: columns that are done are not touched.
        return left - rows_of_u.T @ errors, lax.dynamic_update_slice_in_dim(codes, qb, start, 0)

    _, codes = lax.fori_loop(0, (inputs + missing) // size, block, (left, left))
    return codes[:inputs][jnp.argsort(order)].T


def _coordinate_descent(
    w: Array, codes: Array, scale: Array, zero_point: Array, h: Array, bits: int
) -> Float[Array, "rows inputs"]:
    """Sweep once over the columns, and put each code at its best level given all the others."""
    inputs = w.shape[1]
    size, missing = _blocks(inputs)
    pad = ((0, missing), (0, 0))
    s, z, q = (
        jnp.pad(a, pad, constant_values=1)
        for a in (_per_element(scale, inputs), _per_element(zero_point, inputs), codes.T)
    )
    h = jnp.pad(h, (0, missing)) + _padding_identity(inputs, missing)
    slope = h @ ((q - z) * s - jnp.pad(w.T, pad))  # half the gradient

    def block(k: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        q, slope = state
        start = k * size
        here = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        rows_of_h, sb, zb = here(h), here(s), here(z)
        square = here(rows_of_h, axis=1)
        before = here(q)

        def column(j: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            q, slope = state
            best = _nearest_level((q[j] - zb[j]) * sb[j] - slope[j] / square[j, j], sb[j], zb[j], bits)
            return q.at[j].set(best), slope + square[j][:, None] * ((best - q[j]) * sb[j])[None]

        after, _ = lax.fori_loop(0, size, column, (before, here(slope)))
        return lax.dynamic_update_slice_in_dim(q, after, start, 0), slope + rows_of_h.T @ ((after - before) * sb)

    q, _ = lax.fori_loop(0, (inputs + missing) // size, block, (q, slope))
    return q[:inputs].T


def _least_squares(
    w: Array, codes: Array, scale: Array, zero_point: Array, h: Array, symmetric: bool
) -> tuple[Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """Fit the scales (and zero points) of a row's groups to its codes: one linear system a row.

    v = sum over groups of scale * (codes - zero_point): the unknowns are a group's scale and its -scale * zero_point,
    whose columns in the system are the group's codes and ones.
    """
    rows, groups = scale.shape
    size = w.shape[1] // groups
    levels = (
        (codes.reshape(rows, groups, size) - zero_point[..., None]) if symmetric else codes.reshape(rows, groups, size)
    )
    blocks = h.reshape(groups, size, groups, size)
    pulled = jnp.einsum("rga,gahb->rghb", levels, blocks)
    system, goal = jnp.einsum("rghb,rhb->rgh", pulled, levels), (w @ h).reshape(rows, groups, size)
    wanted = jnp.einsum("rga,rga->rg", goal, levels)
    if not symmetric:
        mixed, ones = pulled.sum(-1), jnp.broadcast_to(blocks.sum((1, 3)), system.shape)
        system = jnp.concatenate(
            [jnp.concatenate([system, mixed], 2), jnp.concatenate([mixed.swapaxes(1, 2), ones], 2)], 1
        )
        wanted = jnp.concatenate([wanted, goal.sum(-1)], 1)
    # Groups with one code throughout make the system singular; they keep their grid below.
    eye = jnp.eye(system.shape[1], dtype=jnp.float32)[None]
    ridge = 1e-6 * jnp.trace(system, axis1=1, axis2=2)[:, None, None] * eye
    found = jnp.linalg.solve(system + ridge, wanted[..., None])[..., 0]
    new = round_mantissa(found[:, :groups], STORED_MANTISSA)
    good = jnp.isfinite(new) & (new > SCALE_MIN) & (new < SCALE_MAX)
    if symmetric:
        return jnp.where(good, new, scale), zero_point
    moved = round_mantissa(-found[:, groups:] / jnp.where(good, new, 1.0), STORED_MANTISSA)
    good &= jnp.isfinite(moved) & (jnp.abs(moved) < LARGEST_ZERO_POINT)
    return jnp.where(good, new, scale), jnp.where(good, moved, zero_point)


def _error(w: Array, codes: Array, scale: Array, zero_point: Array, h: Array) -> Float[Array, "rows"]:
    grouped = codes.reshape(*scale.shape, -1)
    change = ((grouped - zero_point[..., None]) * scale[..., None]).reshape(w.shape) - w
    return jnp.einsum("ri,ri->r", change @ h, change)
