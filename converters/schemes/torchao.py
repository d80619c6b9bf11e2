"""torchao, as it writes plain integers into safetensors.

MODULE._weight_qdata, MODULE._weight_scale, MODULE._weight_zero_point
                  the tensors of a weight; the file's metadata say, under MODULE.weight, of which class it is
Int8Tensor, IntxUnpackedToInt8Tensor
                  qdata, int8 of the weight's shape; scale and zero_point of the shape of blocks: (q - zero) * scale
Int4Tensor        qdata [out, in / 2], the first code in the low bits, signed; scale and zero_point [groups, out]:
                  q * scale + zero
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from aq_jax.converters.schemes.entry import FLOATS, Config, Scheme, Tensors, Weight
from aq_jax.converters.schemes.grids import Packed, spec_of
from aq_jax.store import DTYPES
from aq_jax.store.jsonfile import parse_json

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

_QDATA = "_weight_qdata"
_OF_INPUTS = ("activation_quantization", "act_quant_kwargs")
_ROUNDED = "the file's metadata say that inputs are quantized while the model runs; a table does not say so"
_BITS = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8}


class TorchAo(Scheme):
    about = "torchao"

    def recognizes(self, config: Config) -> bool:
        return config.get("quant_method") == "torchao"

    def leaves_out(self, name: str, source: Source) -> bool:
        return name.rpartition(".")[2] in ("_weight_act_quant_scale", "_weight_act_quant_zero_point")

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        metadata: Mapping[str, str] = getattr(source, "metadata", {})
        for module in tensors.ending(_QDATA, "_weight_scale"):
            found = parse_json(metadata.get(f"{module}weight", "{}").encode(), tensors.where(f"{module}weight"), dict)
            data = found.get("_data")
            if not isinstance(data, dict):
                raise tensors.error(f"the file's metadata do not say what {module}weight is; save it again")
            stored = found.get("_tensor_data_names")
            for leaf in ("qdata", *(stored if isinstance(stored, list) else ())):
                tensors.require(f"{module}_weight_{tensors.text(f'_tensor_data_names of {module}weight', leaf)}")
            if f"{module}_weight_act_pre_scale" in tensors:
                raise tensors.error(f"{module}weight has scales of its inputs, for which a table has no place")
            kind = str(found.get("_type"))
            notes = (_ROUNDED,) if any(data.get(key) is not None for key in _OF_INPUTS) else ()
            if kind == "Int4Tensor":
                yield replace(_four_bits(tensors, module, data), notes=notes)
            elif kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
                yield replace(_bytes(tensors, module, data), notes=notes)
            else:
                raise tensors.error(
                    f"{module}weight is a {kind[:60]}, a layout of a device, or of floats; wanted Int8Tensor, "
                    "IntxUnpackedToInt8Tensor or Int4Tensor, which are plain"
                )


def _bytes(tensors: Tensors, module: str, data: Mapping[str, Any]) -> Weight:
    codes, scales, zeros = (f"{module}_weight_{leaf}" for leaf in ("qdata", "scale", "zero_point"))
    shape = tensors.shape(codes)
    tensors.expect(codes, shape, "int8")
    bits, dtype = _BITS.get(_text(data.get("target_dtype"), "int8")), DTYPES.get(_text(data.get("dtype"), ""))
    if bits is None or dtype is None or dtype.name not in FLOATS or len(shape) < 2 or min(shape) < 1:
        raise tensors.error(f"{codes} is {list(shape)} of {str(dict(data))[:200]}; wanted a matrix of integers")
    group, grids = _blocks(tensors, module, shape, data)
    kind = tensors.expect(scales, grids, *FLOATS)
    parts: tuple[str, ...] = (codes, scales)
    spec = spec_of(bits, "", kind, group, shape)
    if zeros in tensors:
        parts += (zeros,)
        if tensors.expect(zeros, grids, "int8", "int32", *FLOATS) in (np.int8, np.int32):
            spec = spec_of(bits, "integer_zero_point", kind, group, shape)
        else:  # floats are of no known precision
            spec = spec_of(bits, "zero_point", np.dtype(np.float32), group, shape)
    return Weight(f"{module}weight", shape, dtype, spec, parts, partial(_read_bytes, tensors, parts, bits))


def _read_bytes(tensors: Tensors, parts: tuple[str, ...], bits: int) -> Packed:
    codes, scales, *zeros = map(tensors.read, parts)
    half = 1 << (bits - 1)
    if codes.min() < -half or codes.max() >= half:
        raise tensors.error(f"{parts[0]} holds codes from {codes.min()} to {codes.max()}; wanted {bits} bits")
    return Packed(codes, scales, *zeros)


def _four_bits(tensors: Tensors, module: str, data: Mapping[str, Any]) -> Weight:
    codes, scales, zeros = parts = tuple(f"{module}_weight_{leaf}" for leaf in ("qdata", "scale", "zero_point"))
    stored = tensors.shape(codes)
    tensors.expect(codes, stored, "int8", "uint8")
    if len(stored) != 2 or min(stored) < 1:
        raise tensors.error(f"{codes} has shape {list(stored)}; wanted [outputs, inputs / 2]")
    shape = stored[0], stored[1] * 2
    group, grids = _blocks(tensors, module, shape, data)
    dtype = tensors.expect(scales, grids[::-1], *FLOATS)
    tensors.expect(zeros, grids[::-1], dtype.name)
    spec = spec_of(4, "addend" if dtype.itemsize == 2 else "zero_point", dtype, group, shape)
    return Weight(f"{module}weight", shape, dtype, spec, parts, partial(_read_four_bits, tensors, parts))


def _read_four_bits(tensors: Tensors, parts: tuple[str, ...]) -> Packed:
    codes = tensors.read(parts[0]).view(np.uint8) ^ np.uint8(0x88)  # in the table's stream, a code has 8 added
    scales, offsets = (np.ascontiguousarray(tensors.read(name).T) for name in parts[1:])
    if scales.dtype.itemsize == 2:
        return Packed(codes, scales, offsets=offsets)
    if not scales.all():
        raise tensors.error(f"{parts[1]} has a scale of 0; wanted others")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where the grids enter
        return Packed(codes, scales, -offsets / scales)


def _blocks(
    tensors: Tensors, module: str, shape: tuple[int, ...], data: Mapping[str, Any]
) -> tuple[int, tuple[int, ...]]:
    """Return the elements of a row that share a scale (0 for all of the tensor), and the shape of the scales."""
    block = data.get("block_size")
    sizes = [n for n in block if isinstance(n, int)] if isinstance(block, list) else []
    whole = sizes == list(shape)
    of_rows = len(sizes) == len(shape) and {*sizes[:-1]} <= {1} and sizes[-1] > 0 and shape[-1] % sizes[-1] == 0
    if not whole and not of_rows:
        raise tensors.error(f"{module}weight has blocks of {str(block)[:80]}; wanted parts of rows, or all of it")
    grids = tuple(n // size for n, size in zip(shape, sizes, strict=True))
    return 0 if whole and prod(shape[:-1]) > 1 else sizes[-1], grids


def _text(value: object, default: str) -> str:
    """Return the name of a dtype as torchao writes it."""
    return str(value.get("_data")) if isinstance(value, Mapping) else default
