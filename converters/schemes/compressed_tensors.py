"""compressed-tensors: what llm-compressor and others write for vLLM.

pack-quantized      weight_packed, int32 [out, words]: codes u = q + 2^(b-1), from the lowest bit on, across words
                    (releases before 0.18 left spare bits in a word, where codes do not fill it); weight_scale
                    [out, groups]; weight_zero_point [words, groups], packed along the outputs, or int8
                    [out, groups]; weight_shape
int-quantized       weight, int8 [out, in], and the same grids
float-quantized     weight, float8_e4m3fn [out, in]; weight_scale of the tensor, of rows, of groups or of blocks
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.codes.small_grids import Offset
from aq_jax.converters.schemes.compressed_tensors_config import Args, Groups
from aq_jax.converters.schemes.entry import FLOATS, Config, Scheme, Tensors, Weight
from aq_jax.converters.schemes.grids import Packed, spec_of
from aq_jax.converters.schemes.words import dense_words, unpack_rows, unpack_whole_words, whole_words

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

_PACKED, _SCALE, _ZERO, _SHAPE, _ORDER = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
)  # fmt: skip
_SMALL = ("int8", "float8_e4m3fn")
_FLOAT8 = {"float32": "f8_e4m3", "float16": "f8_e4m3_f16", "bfloat16": "f8_e4m3_bf16"}
_LEFT_OUT = re.compile(r"(^|\.)(input|output|k|v|q)_(scale|zero_point|global_scale)$")


class CompressedTensors(Scheme):
    about = "compressed-tensors"

    def recognizes(self, config: Config) -> bool:
        return config.get("quant_method") in ("compressed-tensors", "compressed_tensors") or "config_groups" in config

    def leaves_out(self, name: str, source: Source) -> bool:
        module, _, leaf = name.rpartition(".")
        weight = source.shapes.get(f"{module}.weight" if module else "weight")
        dense = leaf in (_SCALE, _ZERO) and weight is not None and weight[1].name in FLOATS
        return dense or _LEFT_OUT.search(name) is not None

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        groups = Groups(tensors, config)
        for module in tensors.ending(_PACKED):
            yield _packed(tensors, module, groups.of(module, _PACKED))
        small = [m for m in tensors.ending("weight") if source.shapes[f"{m}weight"][1].name in _SMALL]
        for module in dict.fromkeys([*tensors.ending(_SCALE), *small]):
            if f"{module}{_PACKED}" not in tensors and not groups.ignores(module):
                yield from _plain(tensors, module, groups.of(module, "weight"))


def _packed(tensors: Tensors, module: str, args: Args) -> Weight:
    packed, order = tensors.shape(f"{module}{_PACKED}"), f"{module}{_ORDER}"
    named = tuple(f"{module}{leaf}" for leaf in (_PACKED, _SCALE, _SHAPE))
    if len(packed) < 2 or args.floating:
        raise tensors.error(
            f"{named[0]} is {list(packed)}; wanted integers of two axes, with a scale a group or channel"
        )
    tensors.expect(named[2], (len(packed),), "int64", "int32")
    shape = tuple(int(n) for n in tensors.read(named[2]))
    if min(shape) < 1 or (dense := _is_dense(packed[-1], shape[-1], args)) is None or packed[:-1] != shape[:-1]:
        raise tensors.error(
            f"{named[0]} has shape {list(packed)}, and {named[2]} says {list(shape)}: wanted "
            f"{[*shape[:-1], dense_words(max(shape[-1], 0), args.bits)]} for {args.bits} bits"
        )
    tensors.expect(named[0], packed, "int32")
    scales, group, dtype = _scales(tensors, module, shape, args)
    if order in tensors:
        _check_order(tensors, order, shape[-1], group)
        named += (order,)
    zeros, kind = _zero_point(tensors, module, scales, args)
    spec = spec_of(args.bits, kind, dtype, group, shape)
    named += () if zeros is None else (zeros,)
    read = partial(_read_packed, tensors, named[0], f"{module}{_SCALE}", zeros, shape, args, dense)
    return Weight(f"{module}weight", shape, dtype, spec, named, read, notes=args.notes)


def _plain(tensors: Tensors, module: str, args: Args) -> Iterator[Weight]:
    """Find a weight of a byte an element; one that is dense is left as it is."""
    name = f"{module}weight"
    shape, dtype = tensors.shape(name), tensors.dtype(name)
    if dtype.name in FLOATS:  # dense: rounded already, and kept as floats
        return
    tensors.expect(name, shape, "float8_e4m3fn" if args.floating else "int8")
    if len(shape) < 2 or min(shape) < 1:
        raise tensors.error(f"{name} has shape {list(shape)}; wanted two axes or more, of 1 or more")
    scales, group, dtype = _scales(tensors, module, shape, args)
    zeros, kind = _zero_point(tensors, module, scales, args)
    named = (name, f"{module}{_SCALE}", *(() if zeros is None else (zeros,)))
    if args.floating:
        if zeros is not None:
            raise tensors.error(f"{zeros} is there; wanted no zero points of floats")
        spec = replace(spec_of(8, "", np.dtype(np.float32), group, shape), code=_FLOAT8[dtype.name])
        read = partial(_read_floats, tensors, name, named[1], shape, args.block)
        yield Weight(name, shape, dtype, spec, named, read, notes=args.notes)
        return
    spec = spec_of(8, kind, dtype, group, shape)
    read = partial(_read_bytes, tensors, name, named[1], zeros)
    yield Weight(name, shape, dtype, spec, named, read, notes=args.notes)


def _scales(tensors: Tensors, module: str, shape: tuple[int, ...], args: Args) -> tuple[tuple[int, ...], int, np.dtype]:
    """Return the shape of the scales, the elements of a row that share one (0 for a tensor's), and their dtype."""
    name, length = f"{module}{_SCALE}", shape[-1]
    if args.strategy == "tensor":
        found = tensors.shape(name)
        if prod(found) != 1:
            raise tensors.error(f"{name} has shape {list(found)}; wanted one scale")
        return found, 0, tensors.expect(name, found, *FLOATS)
    if args.strategy == "channel":
        wanted, group = (*shape[:-1], 1), length
    elif args.strategy == "group":
        wanted, group = (*shape[:-1], -(-length // args.group)), args.group
    else:
        rows, group = args.block
        if rows < 1 or group < 1 or len(shape) != 2:
            raise tensors.error(
                f"{module}weight has blocks of {list(args.block)}; wanted a matrix in blocks of 1 or more"
            )
        wanted = (-(-shape[0] // rows), -(-length // group))
    if length % group and wanted[-1] > 1:
        raise tensors.error(f"{module}weight has {length} inputs, in groups of {group}; wanted groups that divide them")
    return wanted, min(group, length), tensors.expect(name, wanted, *FLOATS)


def _zero_point(tensors: Tensors, module: str, scales: tuple[int, ...], args: Args) -> tuple[str | None, Offset]:
    """Return the name of the zero points, if there are any, and what a group has: they are integers, or floats."""
    name = f"{module}{_ZERO}"
    if args.symmetric and name not in tensors:
        return None, ""
    if tensors.dtype(name).name == "int32" and args.strategy in ("channel", "group"):
        found, rows = tensors.shape(name), scales[-2]
        if len(found) != len(scales) or _is_dense(found[-2], rows, args) is None:
            tensors.expect(name, (*scales[:-2], dense_words(rows, args.bits), scales[-1]), "int32")
        tensors.expect(name, (*scales[:-2], found[-2], scales[-1]), "int32")
        return name, "packed_zero_point"
    return name, "integer_zero_point" if tensors.expect(name, scales, "int8", *FLOATS) == np.int8 else "zero_point"


def _is_dense(words: int, count: int, args: Args) -> bool | None:
    """Tell whether codes cross words; None if they do not fit into so many."""
    dense, whole = dense_words(count, args.bits), whole_words(count, args.bits)
    if words not in (dense, whole):
        return None
    return words == dense and (args.crosses or words != whole)


def _check_order(tensors: Tensors, name: str, length: int, group: int) -> None:
    tensors.expect(name, (length,), "int32", "int64")
    if not np.array_equal(tensors.read(name), np.arange(length) // max(group, 1)):
        raise tensors.error(
            f"the groups of {name} are no runs of inputs (activation order), for which a table has no place; quantize "
            'it with actorder = "weight" or none'
        )


def _unpacked(words: np.ndarray, bits: int, count: int, dense: bool) -> np.ndarray:
    rows = np.ascontiguousarray(words).reshape(-1, words.shape[-1])
    found = unpack_rows(rows, bits, count) if dense else unpack_whole_words(rows, bits, count)
    return found.reshape(*words.shape[:-1], count)


def _read_packed(
    tensors: Tensors, packed: str, scale: str, zero: str | None, shape: tuple[int, ...], args: Args, dense: bool
) -> Packed:
    words, scales = tensors.read(packed), tensors.read(scale)
    if dense and args.bits < 8 and shape[-1] * args.bits % 8 == 0:  # the words are the table's bytes
        codes = words.view(np.uint8)[..., : shape[-1] * args.bits // 8]
    else:
        codes = _unpacked(words, args.bits, shape[-1], dense)
    return Packed(codes, scales, None if zero is None else _read_zeros(tensors, zero, scales.shape, args))


def _read_zeros(tensors: Tensors, name: str, scales: tuple[int, ...], args: Args) -> np.ndarray:
    found = tensors.read(name)
    if found.dtype != np.int32:
        return found
    dense = bool(_is_dense(found.shape[-2], scales[-2], args))
    return np.swapaxes(_unpacked(np.swapaxes(found, -1, -2), args.bits, scales[-2], dense), -1, -2)


def _read_bytes(tensors: Tensors, name: str, scale: str, zero: str | None) -> Packed:
    return Packed(tensors.read(name), tensors.read(scale), None if zero is None else tensors.read(zero))


def _read_floats(tensors: Tensors, name: str, scale: str, shape: tuple[int, ...], block: tuple[int, int]) -> Packed:
    scales = tensors.read(scale)
    if block[0]:
        scales = np.repeat(scales, block[0], axis=0)[: shape[0]]
    return Packed(tensors.read(name).view(np.int8), scales)
