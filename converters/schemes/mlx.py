"""MLX: what mlx-lm and its relatives write.

    weight      uint32 [out, in * b / 32]: codes u, from the lowest bit on, across words
    scales      float [out, groups]
    biases      float [out, groups]: the value of code 0

The weight is u * scale + bias. An entry of config.json's `quantization` under a layer's name says how it differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.converters.schemes.entry import FLOATS, Config, Scheme, Tensors, Weight
from aq_jax.converters.schemes.grids import Packed, spec_of
from aq_jax.converters.schemes.words import unpack_rows

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

_BITS = (2, 3, 4, 5, 6, 8)


class Mlx(Scheme):
    about = "MLX"

    def recognizes(self, config: Config) -> bool:
        return not {"quant_method", "file", "config_groups"} & set(config) and {"bits", "group_size"} <= set(config)

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        for module in tensors.ending("scales"):
            if tensors.dtype(f"{module}weight") != np.uint32:
                raise tensors.error(f"{module}weight is {tensors.dtype(f'{module}weight').name}; wanted uint32")
            own = config.get(module[:-1])
            yield _weight(tensors, module, {**config, **own} if isinstance(own, Mapping) else config)
        for name, (_, dtype) in source.shapes.items():
            if dtype == np.uint32 and name.endswith("weight"):
                tensors.require(name.removesuffix("weight") + "scales")


def _weight(tensors: Tensors, module: str, config: Config) -> Weight:
    codes, scales, biases = parts = tuple(f"{module}{leaf}" for leaf in ("weight", "scales", "biases"))
    bits, group = (tensors.integer(f"{key} of {codes}", config.get(key)) for key in ("bits", "group_size"))
    if (mode := config.get("mode", "affine")) != "affine" or bits not in _BITS or group < 1:
        raise tensors.error(
            f"{codes} has {bits} bits in groups of {group}, in mode {str(mode)[:40]!r}; wanted one of "
            f"{', '.join(map(str, _BITS))} bits, in mode 'affine'"
        )
    words = tensors.shape(codes)
    shape = (*words[:-1], (*words, 0)[len(words) - 1] * 32 // bits)
    if len(words) < 2 or min(words) < 1 or shape[-1] % group or shape[-1] * bits != words[-1] * 32:
        raise tensors.error(f"{codes} has shape {list(words)}; wanted rows of words, whole groups of {group}")
    dtype = tensors.expect(scales, (*shape[:-1], shape[-1] // group), *FLOATS)
    tensors.expect(biases, (*shape[:-1], shape[-1] // group), dtype.name)
    spec = spec_of(bits, "minimum", dtype, group, shape)
    return Weight(codes, shape, dtype, spec, parts, partial(_read, tensors, parts, bits, shape))


def _read(tensors: Tensors, parts: tuple[str, ...], bits: int, shape: tuple[int, ...]) -> Packed:
    words, scales, biases = map(tensors.read, parts)
    if bits < 8:  # the words are the table's bytes
        return Packed(words.view(np.uint8), scales, offsets=biases)
    codes = unpack_rows(words.reshape(-1, words.shape[-1]), bits, shape[-1])
    return Packed(codes.reshape(shape), scales, offsets=biases)
