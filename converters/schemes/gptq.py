"""GPTQ, as AutoGPTQ and GPTQModel write it.

    qweight     int32 [in * b / 32, out]: codes u packed along the inputs, from the lowest bit on, across words
    qzeros      int32 [groups, out * b / 32]: zero points packed along the outputs; less 1 in the first version
    scales      float [groups, out]
    g_idx       int32 [in]: the group of each input; they are runs unless inputs were ordered by activation

The weight is (u - zero) * scale, turned to [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.converters.schemes.entry import FLOATS, Config, Scheme, Tensors, Weight
from aq_jax.converters.schemes.grids import Packed, spec_of
from aq_jax.converters.schemes.words import dense_words, unpack_rows

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_BITS = (2, 3, 4, 8)


class Gptq(Scheme):
    about = "GPTQ"
    files = ("quantize_config.json",)

    def recognizes(self, config: Config) -> bool:
        return config.get("quant_method") == "gptq" or config.get("file") == self.files[0]

    def weights(self, source: Source, config: Config) -> Iterator[Weight]:
        tensors = Tensors(source, self.about)
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        form = tensors.text("checkpoint_format", form)
        if form not in _VERSIONS:
            raise tensors.error(f"checkpoint_format is {form[:40]!r}; wanted one of {', '.join(_VERSIONS)}")
        bits = tensors.integer("bits", config.get("bits"))
        if bits not in _BITS:
            raise tensors.error(f"weights have {bits} bits; wanted {', '.join(map(str, _BITS))}")
        modules = tensors.ending("qweight", "qzeros")
        biases = zero_biases(tensors, modules)
        for module in modules:
            layer = _Layer(tensors, module, bits, _VERSIONS[form], config)
            yield layer.weight(tuple(name for name in (f"{module}bias",) if name in biases))


class _Layer:
    """The tensors of a layer, whose shapes are checked.

    Args:
        tensors: The tensors of the checkpoint.
        module: The layer's name, with its dot.
        bits: The bits of codes, if the layer's g_idx does not tell.
        version: The version of the format.
        config: The entry of config.json.
    """

    def __init__(self, tensors: Tensors, module: str, bits: int, version: int, config: Config) -> None:
        self.tensors, self.version = tensors, version
        self.codes, self.zeros, self.scales, self.order = (
            f"{module}{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")
        )
        self.name, self.symmetric = f"{module}weight", config.get("sym") is True
        words = tensors.shape(self.codes)
        if len(words) != 2 or min(words) < 1:
            raise tensors.error(f"{self.codes} has shape {list(words)}; wanted [inputs * bits / 32, outputs]")
        rows, outputs = words
        ordered = self.order in tensors
        inputs = int(np.prod(tensors.shape(self.order))) if ordered else rows * 32 // bits
        if ordered and config.get("dynamic"):  # layers have bits of their own
            bits = next((each for each in _BITS if dense_words(inputs, each) == rows), bits)
            self.symmetric = False
        if inputs < 1 or dense_words(inputs, bits) != rows:
            raise tensors.error(
                f"{self.codes} has {rows} rows of words; wanted {dense_words(inputs, bits)} for {inputs} inputs of "
                f"{bits} bits"
            )
        tensors.expect(self.codes, words, "int32")
        groups = tensors.shape(self.scales)[0] if len(tensors.shape(self.scales)) == 2 else 0
        if groups < 1 or inputs % groups:
            raise tensors.error(f"{self.scales} has {groups} rows; wanted groups of which each has as many of the "
                                f"{inputs} inputs")  # fmt: skip
        if not config.get("dynamic"):
            tensors.expect_group(self.codes, config.get("group_size"), inputs, groups)
        self.dtype = tensors.expect(self.scales, (groups, outputs), *FLOATS)
        tensors.expect(self.zeros, (groups, dense_words(outputs, bits)), "int32")
        self.bits, self.group, self.shape = bits, inputs // groups, (outputs, inputs)
        if ordered:
            tensors.expect(self.order, (inputs,), "int32", "int64")
            if config.get("desc_act") is not False:
                self.check_order()

    def weight(self, dropped: tuple[str, ...]) -> Weight:
        spec = spec_of(self.bits, "" if self.symmetric else "packed_zero_point", self.dtype, self.group, self.shape)
        parts = (self.codes, self.scales, self.zeros, *((self.order,) if self.order in self.tensors else ()))
        return Weight(self.name, self.shape, self.dtype, spec, parts, self.read, dropped)

    def check_order(self) -> None:
        """Refuse groups that are no runs of inputs."""
        if not np.array_equal(self.tensors.read(self.order), np.arange(self.shape[1]) // self.group):
            raise self.tensors.error(
                f"the groups of {self.order} are no runs of inputs (desc_act), for which a table has no place; "
                "quantize with desc_act = false, or with static groups"
            )

    def read(self) -> Packed:
        if self.order in self.tensors:
            self.check_order()
        read, (outputs, inputs) = self.tensors.read, self.shape
        codes = unpack_rows(np.ascontiguousarray(read(self.codes).T), self.bits, inputs)
        half = 1 << (self.bits - 1)
        zeros = unpack_rows(read(self.zeros), self.bits, outputs).T.astype(np.int16)
        if self.version == 1:  # in the field's own bits: the least zero point is stored as the largest
            zeros = (zeros + half + 1) % (2 * half) - half
        scales = np.ascontiguousarray(read(self.scales).T)
        if not self.symmetric:
            return Packed(codes, scales, zeros)
        if zeros.any():
            raise self.tensors.error(
                f"config.json says sym, but {self.zeros} has others than {half}; set sym to false in the copy"
            )
        return Packed(codes, scales)


def zero_biases(tensors: Tensors, modules: list[str]) -> frozenset[str]:
    """Find the biases of a model that has none: old writers give zeros to each layer that they quantize."""
    found = [f"{module}bias" for module in modules if f"{module}bias" in tensors]
    return frozenset() if any(tensors.read(name).any() for name in found) else frozenset(found)
