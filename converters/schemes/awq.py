"""AWQ, as AutoAWQ writes it for its kernel GEMM.

    qweight     int32 [in, out / 8]: the nibbles of a word, from the lowest on, are outputs 0 2 4 6 1 3 5 7
    qzeros      int32 [groups, out / 8]: zero points, in the same order
    scales      float [groups, out]

The weight is (u - zero) * scale, turned to [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.converters.schemes.entry import FLOATS, Config, Scheme, Tensors, Weight
from aq_jax.converters.schemes.gptq import zero_biases
from aq_jax.converters.schemes.grids import Packed, spec_of

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of each nibble of a word."""


class Awq(Scheme):
    about = "AWQ"
    files = ("quant_config.json",)

    def recognizes(self, config: Config) -> bool:
        return config.get("quant_method") == "awq" or config.get("file") == self.files[0]

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        version = str(config.get("version") or config.get("checkpoint_format") or "gemm").lower()
        if version != "gemm":
            raise tensors.error(f"version is {version[:40]!r}, the layout of another kernel; wanted gemm")
        if (bits := config.get("bits", config.get("w_bit", 4))) != 4:
            raise tensors.error(f"weights have {str(bits)[:40]} bits; wanted 4")
        modules = tensors.ending("qweight", "qzeros")
        biases = zero_biases(tensors, modules)
        for module in modules:
            yield _weight(tensors, module, config, tuple(name for name in (f"{module}bias",) if name in biases))


def _weight(tensors: Tensors, module: str, config: Config, dropped: tuple[str, ...]) -> Weight:
    codes, zeros, scales = parts = tuple(f"{module}{leaf}" for leaf in ("qweight", "qzeros", "scales"))
    words, groups = tensors.shape(codes), (*tensors.shape(scales), 0)[0]
    if len(words) != 2 or min(words) < 1 or groups < 1 or words[0] % groups:
        raise tensors.error(
            f"{codes} has shape {list(words)}, with {groups} groups; wanted [inputs, outputs / 8], and groups of which "
            "each has as many of the inputs"
        )
    shape = words[1] * len(_OUTPUTS), words[0]
    tensors.expect_group(codes, config.get("group_size", config.get("q_group_size")), shape[1], groups)
    tensors.expect(codes, words, "int32")
    tensors.expect(zeros, (groups, words[1]), "int32")
    dtype = tensors.expect(scales, (groups, shape[0]), *FLOATS)
    spec = spec_of(4, "integer_zero_point", dtype, shape[1] // groups, shape)
    return Weight(f"{module}weight", shape, dtype, spec, parts, partial(_read, tensors, parts), dropped)


def _read(tensors: Tensors, parts: tuple[str, ...]) -> Packed:
    codes, zeros, scales = map(tensors.read, parts)
    return Packed(_unpacked(codes), np.ascontiguousarray(scales.T), _unpacked(zeros))


def _unpacked(words: np.ndarray) -> np.ndarray:
    """Unpack [rows, outputs / 8] words to codes [outputs, rows]."""
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    codes = np.empty((turned.shape[0], len(_OUTPUTS), turned.shape[1]), np.int8)
    for nibble, output in enumerate(_OUTPUTS):
        codes[:, output] = (turned >> np.uint32(4 * nibble)) & np.uint32(15)
    codes -= 8
    return codes.reshape(-1, turned.shape[1])
