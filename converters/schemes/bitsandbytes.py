"""bitsandbytes, as transformers saves it.

nf4, fp4    weight, bytes [(n + 1) / 2, 1] of two numbers of levels, the first in the high nibble; weight.absmax,
            float32, the scale of each block of the flattened weight; weight.quant_map, the levels; a JSON object in
            the bytes of weight.quant_state.bitsandbytes__nf4 or __fp4
nested      weight.absmax, bytes: numbers of weight.nested_quant_map, times weight.nested_absmax of each block of
            them, plus nested_offset
int8        weight, int8 [out, in]; SCB, float32 [out]: 127 times the scale of each row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from aq_jax.codes import CODES, Code, Levels, Nested
from aq_jax.codes.nested import BLOCK
from aq_jax.config import QuantSpec
from aq_jax.conversion.prequantized import read_config
from aq_jax.converters.schemes.entry import FLOATS, Config, Scheme, Tensors, Weight
from aq_jax.converters.schemes.grids import Packed, spec_of
from aq_jax.store import DTYPES
from aq_jax.store.jsonfile import parse_json

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

_STATE = "quant_state.bitsandbytes__"
_BYTES = ("uint8", "int8", "float16", "bfloat16", "float32")
_INT8 = np.float32(7.874015718698502e-3)
"""1/127, as bitsandbytes multiplies by it."""
_MAX_STATE = 1 << 16


class BitsAndBytes(Scheme):
    about = "bitsandbytes"

    def recognizes(self, config: Config) -> bool:
        return config.get("quant_method") == "bitsandbytes"

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        for kind in ("nf4", "fp4"):
            for weight in tensors.ending(_STATE + kind):
                yield _four_bits(tensors, weight[:-1], kind)
        for weight in tensors.ending("absmax"):
            if not any(f"{weight}{_STATE}{kind}" in tensors for kind in ("nf4", "fp4")):
                raise tensors.error(f"{weight}{_STATE}nf4 is missing, which says how {weight[:-1]} is stored")
        fields = read_config(source.folder)
        dtype = DTYPES.get(str(fields.get("dtype") or fields.get("torch_dtype")), np.dtype(np.float16))
        codes = [module for module in tensors.ending("weight") if source.shapes[f"{module}weight"][1] == np.int8]
        for module in dict.fromkeys([*tensors.ending("SCB"), *codes]):
            if f"{module}weight.absmax" not in tensors:
                yield _int8(tensors, module, dtype)


def _four_bits(tensors: Tensors, name: str, kind: str) -> Weight:
    state, absmax, levels = (f"{name}.{leaf}" for leaf in (_STATE + kind, "absmax", "quant_map"))
    if prod(tensors.shape(state)) > _MAX_STATE or tensors.dtype(state) != np.uint8:
        raise tensors.error(f"{state} is {tensors.dtype(state).name} {list(tensors.shape(state))}; wanted some bytes")
    found: dict[str, Any] = parse_json(tensors.read(state).tobytes(), tensors.where(state), dict)
    block, shape = tensors.integer(f"blocksize of {state}", found.get("blocksize")), found.get("shape")
    dtype = DTYPES.get(str(found.get("dtype")))
    if not isinstance(shape, list) or not shape or block < 1 or dtype is None or dtype.name not in FLOATS:
        raise tensors.error(
            f"{state} says shape {str(shape)[:80]}, {found.get('dtype')}, blocks of {block}; wanted floats"
        )
    sizes = tuple(tensors.integer(f"an axis of {state}", size) for size in shape)
    count = prod(sizes)
    stored = prod(tensors.shape(name)) * tensors.dtype(name).itemsize
    if min(sizes) < 1 or tensors.dtype(name).name not in _BYTES or stored != -(-count // 2):
        raise tensors.error(f"{name} has {stored} bytes; wanted {-(-count // 2)} for {list(sizes)}")
    blocks = -(-count // block)
    nested = tensors.expect(absmax, (blocks,), "float32", "uint8") == np.uint8
    tensors.expect(levels, (16,), "float32")
    parts = (name, absmax, levels, state)
    if nested:
        size = tensors.integer(f"nested_blocksize of {state}", found.get("nested_blocksize"))
        tensors.number(f"nested_offset of {state}", found.get("nested_offset"))
        if size < 1:
            raise tensors.error(f"{state} has nested_blocksize {size}; wanted 1 or more")
        tensors.expect(f"{name}.nested_absmax", (-(-blocks // size),), "float32")
        tensors.expect(f"{name}.nested_quant_map", (256,), "float32")
        parts += (f"{name}.nested_absmax", f"{name}.nested_quant_map")
        if size == BLOCK and _stays_nested(CODES[f"{kind}_nested"], _nesting(tensors, name, found), sizes, block):
            kind += "_nested"
    read = partial(_read_four_bits, tensors, name, kind, count, found)
    return Weight(name, sizes, dtype, QuantSpec(4, group_size=block, code=kind), parts, read)


def _nesting(tensors: Tensors, name: str, state: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the levels of scales, their offset, and the largest of each block."""
    table, largest = (tensors.read(f"{name}.nested_{part}") for part in ("quant_map", "absmax"))
    return table, np.array([state["nested_offset"]], np.float32), largest


def _stays_nested(code: Code, nesting: tuple[np.ndarray, ...], shape: tuple[int, ...], block: int) -> bool:
    """Tell whether a table holds these numbers, and each block has a scale above zero for groups of zeros."""
    (table, offset, largest), numbers = nesting, np.concatenate(nesting)
    refused = code.refuses_layout(shape, 0, block) or code.refuses_grids(numbers[:0], numbers)
    return not refused and bool((table.max() * largest + offset > 0).all())


def _read_four_bits(tensors: Tensors, name: str, kind: str, count: int, state: Mapping[str, Any]) -> Packed:
    code, levels = CODES[kind], tensors.read(f"{name}.quant_map")
    nested, code = (code, code.base) if isinstance(code, Nested) else (None, code)
    assert isinstance(code, Levels)  # noqa: S101
    if not np.array_equal(levels, np.asarray(code.table, np.float32)):
        raise tensors.error(f"{name}.quant_map has other levels than {code.name}; wanted those of the format")
    packed = np.ascontiguousarray(tensors.read(name)).reshape(-1).view(np.uint8)
    nibbles = np.empty((packed.size, 2), np.int8)
    nibbles[:, 0], nibbles[:, 1] = packed >> 4, packed & 15
    nibbles -= 8
    absmax, codes = tensors.read(f"{name}.absmax"), nibbles.reshape(-1)[:count]
    if absmax.dtype != np.uint8:
        return Packed(codes, absmax)
    table, offset, largest = _nesting(tensors, name, state)
    if nested is not None:
        return Packed(codes, absmax, np.concatenate([table, offset, largest]))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where the grids enter
        return Packed(codes, table[absmax] * np.repeat(largest, state["nested_blocksize"])[: absmax.size] + offset)


def _int8(tensors: Tensors, module: str, dtype: np.dtype) -> Weight:
    codes, scales, form = (f"{module}{leaf}" for leaf in ("weight", "SCB", "weight_format"))
    shape = tensors.shape(codes)
    if len(shape) != 2 or min(shape) < 1:
        raise tensors.error(f"{codes} has shape {list(shape)}; wanted [outputs, inputs]")
    tensors.expect(codes, shape, "int8")
    tensors.expect(scales, shape[:1], "float32")
    if form in tensors:
        tensors.expect(form, tensors.shape(form), "uint8", "int8", "int32", "int64")
    if form in tensors and (prod(tensors.shape(form)) != 1 or tensors.read(form).any()):
        raise tensors.error(f"{form} is not 0: a layout of a GPU; wanted rows")
    spec = spec_of(8, "", np.dtype(np.float32), shape[1], shape)
    parts = (codes, scales, *((form,) if form in tensors else ()))
    return Weight(codes, shape, dtype, spec, parts, partial(_read_int8, tensors, codes, scales))


def _read_int8(tensors: Tensors, codes: str, scales: str) -> Packed:
    return Packed(tensors.read(codes), tensors.read(scales) * _INT8)
