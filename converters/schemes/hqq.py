"""HQQ, of groups along the inputs (axis 1), as HQQLinear saves its state.

    W_q         codes u of [rows, group], packed along the rows: bytes hold the codes of 2 or 4 blocks of rows, the
                first in the highest bits; of 3 bits, words of 32 bits hold those of 10 blocks; of 5 bits and more, a
                byte holds a code
    scale, zero float [rows, 1]
    nbits, group_size, axis, shape, packing, ...    numbers, and texts as bytes

The weight is (u - zero) * scale, of `shape`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.config import QuantSpec
from aq_jax.converters.schemes.entry import FLOATS, Config, Scheme, Tensors, Weight
from aq_jax.converters.schemes.grids import Packed, spec_of

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

# The bits -> the name of the packing, its integers, and how many codes one holds.
_PACKINGS = {
    8: ("8bit_u8", np.uint8, 1), 6: ("8bit_u8", np.uint8, 1), 5: ("8bit_u8", np.uint8, 1), 4: ("4bit_u8", np.uint8, 2),
    3: ("3bit_32", np.int32, 10), 2: ("2bit_u8", np.uint8, 4),
}  # fmt: skip
_GRIDS = ("quant_scale", "quant_zero")
_NUMBERS = ("nbits", "group_size", "axis")
_OTHERS = (
    "shape", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype",
    "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_MAX_TEXT = 256


class Hqq(Scheme):
    about = "HQQ"

    def recognizes(self, config: Config) -> bool:
        return config.get("quant_method") == "hqq"

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        for module in tensors.ending("W_q", "nbits"):
            yield _weight(tensors, module)


def _weight(tensors: Tensors, module: str) -> Weight:
    codes, scales, zeros = (f"{module}{leaf}" for leaf in ("W_q", "scale", "zero"))
    bits, group, axis = (_number(tensors, f"{module}{leaf}") for leaf in _NUMBERS)
    packing = "".join(chr(n % 256) for n in _integers(tensors, f"{module}packing"))
    shape = tuple(_integers(tensors, f"{module}shape"))
    if axis != 1:
        raise tensors.error(f"{module}axis is {axis}: its groups are no runs of inputs; wanted axis 1")
    if any(any(_integers(tensors, name)) for leaf in _GRIDS if (name := module + leaf) in tensors):
        raise tensors.error(f"{scales} or {zeros} is quantized itself; wanted floats")
    known = _PACKINGS.get(bits, ("", np.uint8, 1))
    if packing != known[0] or len(shape) < 2 or min(shape) < 1 or group < 1 or prod(shape) % group:
        raise tensors.error(
            f"{codes} is packed as {packing[:40]!r}: {bits} bits, shape {list(shape)}, groups of {group}; wanted "
            f"{', '.join(map(str, _PACKINGS))} bits, and whole groups"
        )
    rows = prod(shape) // group
    found, dtype, blocks = tensors.shape(codes), tensors.dtype(codes), -(-rows // known[2])
    stored = prod(found) * dtype.itemsize
    if stored != blocks * group * np.dtype(known[1]).itemsize or (bits != 3 and rows % known[2]):
        raise tensors.error(f"{codes} is {dtype.name} {list(found)}; wanted {known[2]} codes each of {rows} x {group}")
    kind = tensors.expect(scales, (rows, 1), *FLOATS)
    tensors.expect(zeros, (rows, 1), kind.name)
    spec = spec_of(bits, "unsigned_zero_point", kind, group, shape)
    others = (f"{module}{leaf}" for leaf in (*_NUMBERS, *_OTHERS))
    parts = (codes, scales, zeros, *(name for name in others if name in tensors))
    return Weight(f"{module}weight", shape, kind, spec, parts, partial(_read, tensors, module, spec, (rows, group)))


def _integers(tensors: Tensors, name: str) -> list[int]:
    shape, dtype = tensors.shape(name), tensors.dtype(name)
    if prod(shape) > _MAX_TEXT or dtype.kind not in "iu":
        raise tensors.error(f"{name} is {dtype.name} {list(shape)}; wanted an integer, or a few")
    return tensors.read(name).reshape(-1).tolist()


def _number(tensors: Tensors, name: str) -> int:
    if len(found := _integers(tensors, name)) != 1:
        raise tensors.error(f"{name} has {len(found)} numbers; wanted one")
    return found[0]


def _read(tensors: Tensors, module: str, spec: QuantSpec, grid: tuple[int, int]) -> Packed:
    (rows, group), bits = grid, spec.bits
    _, kind, count = _PACKINGS[bits]
    packed = np.ascontiguousarray(tensors.read(f"{module}W_q")).reshape(-1).view(kind).reshape(-1, group)
    width = bits if count > 1 else 8
    codes = np.empty((count, *packed.shape), np.int16)
    for i in range(count):
        codes[i] = (packed >> (width * (count - 1 - i))) & ((1 << width) - 1)
    half = 1 << (bits - 1)
    codes = codes.reshape(-1, group)[:rows] - half
    if codes.size and codes.max() >= half:
        raise tensors.error(f"{module}W_q holds the code {codes.max() + half}; wanted {bits} bits")
    scales, zeros = (tensors.read(f"{module}{leaf}") for leaf in ("scale", "zero"))
    return Packed(codes.astype(np.int8), scales, zeros if spec.code else zeros.astype(np.float32) - half)
