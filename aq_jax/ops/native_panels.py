"""Weights as the native kernels read them: panels of 16 outputs, whose codes lie in planes of 8, 4, 2 or 1 bits.

Trellis codes stay as they are, and only their scales and constants are prepared.

A line of 64 bytes has a word for each of 16 outputs. A word of a plane of b bits has 32 / b codes' bits of it: code
4 s + j in byte j, from bit b s on, so that a shift and a mask give four codes in the bytes of a word.

    4 bits, byte j of a word: code 4 + j, code j

Widths without a plane of their own have two: 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1 bits, the lower bits first. A chunk is the
fewest codes that fill a line of each plane: its lines of the first plane, then that of the second. Groups are filled up
to whole chunks: where more bits and shorter chunks take fewer bytes, codes get them.

Grids keep their dtype, and their bytes: one element of 16 outputs after the other. Zero points of another dtype than
the scales' get theirs, which holds them exactly: the signed bytes beside halves.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped, UInt8

from aq_jax import native
from aq_jax.codes import Trellis, bits_jax
from aq_jax.codes.records import Records
from aq_jax.codes.small_grids import PlainGrids, SmallGrids
from aq_jax.codes.trellis_numpy import row_sums
from aq_jax.core.qtensor import QTensor
from aq_jax.store import aligned_empty

PANEL = 16
WIDTHS = (2, 3, 4, 5, 6, 8)
NO_LIFT = -1  # of codes whose offsets are zero points


class Panels(NamedTuple):
    """A weight [outputs, inputs]; outputs are filled up to whole panels, the inputs of a group to whole chunks.

    Args:
        codes: code + 2^(bits - 1), in planes; of trellis codes the format's bytes.
        grids: The elements of scales, and then of zero points, if there are any.
        constants: The sum of each output's weights, which an offset of its inputs is multiplied by; and the zero point
            that its groups share, which is read instead of theirs, or NaN.
    """

    codes: UInt8[Array, "panels lines 16 4"] | UInt8[Array, "bytes"]
    grids: Shaped[Array, "panels parts elements 16"]
    constants: Float[Array, "panels 2 16"]


class _Planes(NamedTuple):
    """The bits of the two planes (0 for none), and of a chunk the steps of four codes, and the lines."""

    main: int
    rest: int
    steps: int
    lines: int


def _planes(bits: int) -> _Planes:
    """Divide a code's bits into planes.

    >>> _planes(4), _planes(3)
    (_Planes(main=4, rest=0, steps=2, lines=1), _Planes(main=2, rest=1, steps=8, lines=3))
    """
    main = 8 if bits == 8 else 4 if bits >= 4 else 2
    rest = bits - main
    steps = 8 // (rest or main)
    return _Planes(main, rest, steps, steps * bits // 8)


def to_panels(q: QTensor) -> Panels:
    """Turn a weight whose groups each lie in a row: by the library, unless JAX traces it."""
    leaves = jax.tree.leaves(q)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(to_panels, q)
    library = None if any(isinstance(leaf, Tracer) for leaf in leaves) else native.open_library()
    xp: Any = jnp if library is None else np
    outputs, inputs = q.shape
    groups, bits = _row_groups(q), panel_bits(q)
    codes, more = xp.asarray(q.codes), -outputs % PANEL
    octets: Any
    code = q.spec.coding
    if isinstance(code, Trellis):
        sums = code.levels(q).sum(-1, dtype=np.int32) if library is None else row_sums(code, np.asarray(codes), q.shape)
        octets, sums = jnp.asarray(q.codes), sums[:, None]
    elif library is None:
        unpacked = bits_jax.unpack(codes, q.spec.bits) if q.packed else codes
        lines, sums = _to_lines(unpacked.reshape(outputs, groups, -1), bits)
        turned = jnp.pad(lines, ((0, more), (0, 0))).reshape(-1, PANEL, lines.shape[1]).swapaxes(1, 2)
        octets = turned.view(np.uint8).reshape(*turned.shape, 4)
    else:
        octets, sums = _turn(library, codes, q.spec.bits, bits, (outputs, inputs, groups))
    parts = [xp.asarray(part) for part in (q.scale, q.zero_point) if part is not None]
    zeros = xp.zeros((1, 1), np.float32)
    scale, zero_point, minimum = (
        zeros if grid is None else grid.reshape(-1, groups) for grid in code.float_grids(*(*parts, None)[:2])
    )
    wide, size = (np.float32 if xp is jnp else np.float64), inputs // groups
    weights = (scale * (sums.astype(wide) - wide(size) * zero_point) + wide(size) * minimum).sum(1)
    shared = xp.where((zero_point == zero_point[:, :1]).all(1), zero_point[:, 0], np.float32(np.nan))
    elements = q.scale.shape[-1] if q.by_row else 1
    if isinstance(code, PlainGrids) and code.packs_zeros:
        parts[1] = code.unpacked_zeros(parts[1])
    parts = [part.astype(parts[0].dtype).reshape(-1, elements) for part in parts]
    grids = xp.stack([xp.broadcast_to(part, (outputs, elements)) for part in parts])
    grids = xp.pad(grids, ((0, 0), (0, more), (0, 0))).reshape(len(parts), -1, PANEL, elements).transpose(1, 0, 3, 2)
    constants = xp.stack([weights.astype(np.float32), xp.broadcast_to(shared.astype(np.float32), (outputs,))])
    constants = xp.pad(constants, ((0, 0), (0, more))).reshape(2, -1, PANEL).swapaxes(0, 1)
    panels = Panels(octets, grids, constants)
    where = q.codes.sharding if xp is np and getattr(q.codes, "committed", False) else None
    # Without a copy of what was turned here, which lies in large pages, since NumPy asks for them.
    return jax.device_put(panels, where)


def code_attributes(q: QTensor) -> dict[str, np.int64]:
    """Describe a weight to the library: its codes, the steps of trellis codes, of int8 levels, and its grids."""
    code = q.spec.coding
    steps = (code.step_bits, code.step_rows) if isinstance(code, Trellis) else (0, 0)
    found = {
        "bits": 8 if steps[0] else panel_bits(q),
        "step_bits": steps[0],
        "step_rows": steps[1],
        "groups": _row_groups(q),
        "sub_bits": code.sub_bits if isinstance(code, Records) else 0,
        "lift": code.lift if isinstance(code, SmallGrids) and code.adds else NO_LIFT,
        "zero_base": code.zero_base if isinstance(code, PlainGrids) else 0,
    }
    return {name: np.int64(number) for name, number in found.items()}


def panel_bits(q: QTensor) -> int:
    """Choose the bits of a code in panels: those that take the fewest bytes, with groups of whole chunks."""
    size = q.length // _row_groups(q)

    def line_bits(bits: int) -> int:
        chunk = 4 * _planes(bits).steps
        return -(-size // chunk) * chunk * bits

    return min((bits for bits in WIDTHS if bits >= q.spec.bits), key=line_bits)


def _row_groups(q: QTensor) -> int:
    return q.row_groups if q.by_row else 1


def _turn(
    library: ctypes.CDLL, codes: np.ndarray, code_bits: int, bits: int, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Turn codes, a bit stream for each row or signed bytes, into panels of so many bits; sum those of each group."""
    outputs, inputs, groups = shape
    planes = _planes(bits)
    lines = -(-inputs // groups // (4 * planes.steps)) * planes.lines * groups
    panels = -(-outputs // PANEL)
    turned = aligned_empty((panels, lines, PANEL, 4), np.uint8)
    sums = np.empty((outputs, groups), np.int32)
    codes = np.ascontiguousarray(codes)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (codes, turned, sums))
    from_codes, to_turned, to_sums = pointers
    counts = (ctypes.c_int64(count) for count in (code_bits, bits, outputs, inputs, groups))
    library.aq_to_panels(from_codes, int(codes.dtype == np.uint8), *counts, to_turned, to_sums)
    return turned, sums


def _to_lines(codes: Array, bits: int) -> tuple[Array, Array]:
    """Put the codes of each row [rows, groups, size] into the words of its lines [rows, lines]; sum each group's."""
    planes, (rows, _, size) = _planes(bits), codes.shape
    sums = codes.sum(-1, dtype=np.int32)
    codes = codes.view(np.uint8) + np.uint8(2 ** (bits - 1))  # modulo 256
    codes = jnp.pad(codes, ((0, 0), (0, 0), (0, -size % (4 * planes.steps))))
    words = codes.view(np.uint32).reshape(rows, -1, planes.steps)
    each = 8 // planes.main
    low = words & _mask(planes.main)
    parts = [_join(low[..., i : i + each], planes.main) for i in range(0, planes.steps, each)]
    if planes.rest:
        parts.append(_join((words >> np.uint32(planes.main)) & _mask(planes.rest), planes.rest))
    return jnp.stack(parts, -1).reshape(rows, -1), sums


def from_panels(panels: Panels, like: QTensor) -> QTensor:
    """Turn panels back, bit for bit; `like` tells the shapes."""
    outputs, inputs = like.shape
    bits, groups = panel_bits(like), _row_groups(like)
    if isinstance(like.spec.coding, Trellis):
        scale = panels.grids[:, 0, 0].reshape(-1)[:outputs].reshape(like.scale.shape)
        return dataclasses.replace(like, codes=panels.codes, scale=scale)
    planes = _planes(bits)
    words = jax.lax.bitcast_convert_type(jnp.asarray(panels.codes), jnp.uint32)  # [panels, lines, 16]
    lines = words.swapaxes(1, 2).reshape(-1, words.shape[1] // planes.lines, planes.lines)
    each = 8 // planes.main
    low = _split(lines[..., : planes.steps // each], planes.main)
    if planes.rest:
        low = low | _split(lines[..., -1:], planes.rest) << np.uint32(planes.main)
    octets = jax.lax.bitcast_convert_type(low, jnp.uint8).reshape(low.shape[0], groups, -1)
    octets = octets[:outputs, :, : inputs // groups].reshape(outputs, inputs)
    codes = (octets - np.uint8(2 ** (bits - 1))).view(np.int8)
    if like.packed:
        codes = bits_jax.pack(codes, like.spec.bits)
    _, parts, elements, _ = panels.grids.shape
    grids = panels.grids.transpose(1, 0, 3, 2).reshape(parts, -1, elements)[:, :outputs]

    def shaped(grid: Array, shape: tuple[int, ...]) -> Array:
        return (grid if grid.size == np.prod(shape) else grid[:1]).reshape(shape)  # one for all, or one for each

    scale, code = shaped(grids[0], like.scale.shape), like.spec.coding
    zeros = None
    if like.zero_point is not None and isinstance(code, PlainGrids) and code.packs_zeros:
        zeros = bits_jax.pack(shaped(grids[1], like.scale.shape).astype(jnp.int8), code.bits)
    elif like.zero_point is not None:
        zeros = shaped(grids[1], like.zero_point.shape).astype(code.zero_dtype)
    return dataclasses.replace(like, codes=codes, scale=scale, zero_point=zeros)


def _mask(bits: int) -> np.uint32:
    """Mask the lowest bits of each byte of a word.

    >>> hex(_mask(4))
    '0xf0f0f0f'
    """
    return np.uint32(0x01010101 * (2**bits - 1))


def _join(steps: Array, bits: int) -> Array:
    """Put several steps into one word of a plane."""
    word = steps[..., 0]
    for i in range(1, steps.shape[-1]):
        word = word | (steps[..., i] << np.uint32(bits * i))
    return word


def _split(words: Array, bits: int) -> Array:
    """Undo `_join`: the steps of all words [rows, chunks, words] one after the other."""
    if bits == 8:
        return words
    steps = jnp.stack([(words >> np.uint32(at)) & _mask(bits) for at in range(0, 8, bits)], axis=-1)
    return steps.reshape(*words.shape[:-1], -1)
