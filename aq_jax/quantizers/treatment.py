"""Decide what becomes of a tensor under a model's config, and count the bytes: here, and nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aq_jax.config import Compression, QuantizationConfig, QuantSpec
from aq_jax.errors import some_of
from aq_jax.quantizers import Entry
from aq_jax.quantizers.eligibility import is_floating
from aq_jax.quantizers.lookup import candidates, quantizer_of
from aq_jax.store import pieces
from aq_jax.store.layout import column_bytes
from aq_jax.store.schema import GROUP_BYTES

# Stacked over layers or heads, norms have two axes and biases two or more. "ln" is a word of its own, as in ln_1, ln_f.
# Flax calls weights kernel and embedding, wherever they are: a norm that is computed from something has them, too.
_NORM = re.compile(r"norm|(?<![a-z])ln(?![a-z])", re.IGNORECASE)
_WEIGHTS = ("kernel", "embedding")
# Parquet copies data twice, into a page and behind the page's header; compression copies it once more.
COPIES: dict[Compression, int] = {"none": 2, "zstd": 3}


@dataclass(frozen=True, slots=True)
class Treatment:
    """The decision about one tensor, and its bytes.

    Args:
        policy: The tensor's config (`QuantizationConfig.for_tensor`).
        shape: The tensor's shape.
        dtype: The tensor's dtype.
        spec: The numerics of its codes; None if it is not quantized.
        quantizer: The quantizer that chooses its codes; None if it is not quantized.
        half: Whether it is kept in float16, if that can hold it.
        vector: Whether it is left alone because its name is that of a norm or a bias, though it has two axes or more.
        instead_of: The quant_type that was asked for, if no tensor of this shape can have it.
    """

    policy: QuantizationConfig
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: QuantSpec | None = None
    quantizer: Entry | None = None
    half: bool = False
    vector: bool = False
    instead_of: str = ""

    @property
    def quant_type(self) -> str:
        """The format's name of the result, if float16 can hold it."""
        return self.spec.quant_type if self.spec is not None else "fp16" if self.half else "none"

    @property
    def stored_bytes(self) -> int:
        """The most bytes of a table's large columns: scales and zero points count in full."""
        return sum(self.columns.values())

    @property
    def columns(self) -> dict[str, int]:
        """The bytes of a table's large columns, before scales and zero points are compressed.

        >>> treat(QuantizationConfig("int2", group_size=128), "w", (4, 256), np.dtype("float32")).columns
        {'data': 256, 'scales': 32, 'zero_points': 32}
        """
        return self._columns(math.prod(self.shape))

    def peak_bytes(self, compression: Compression = "none") -> int:
        """Bound the bytes of memory, beside the tensor itself, while it is quantized and written.

        >>> treat(QuantizationConfig("int8"), "w", (1024, 1024), np.dtype("float32")).peak_bytes() >> 20
        11
        """
        spec, count, copies = self.spec, math.prod(self.shape), COPIES[compression]
        cuts = pieces(self.shape, self.dtype.name, spec and spec.quant_type, *self._grouping)
        largest = max(stop - start for start, stop in cuts)
        if spec is None or self.quantizer is None:
            return (
                2 * (count + copies * largest) if self.half else copies * largest * self.dtype.itemsize
            ) + GROUP_BYTES
        codes = self._columns(largest)["data"]
        made = codes * candidates(self.quantizer, spec.coding, self.policy.symmetric)
        if largest * spec.bits % 8 or spec.group_elements(self.shape) * spec.bits % 8:
            made += 2 * largest  # a byte a code, until all can be packed
        rotated = 4 * count if spec.rotation or spec.coding.matrices else 0
        grids = self.stored_bytes - self._columns(count)["data"]
        return made + copies * codes + 6 * grids + rotated + GROUP_BYTES

    @property
    def _grouping(self) -> tuple[int, int]:
        return (-1, 0) if self.spec is None else (self.spec.quant_axis, self.spec.group_size)

    def _columns(self, count: int) -> dict[str, int]:
        return column_bytes(count, self.shape, self.dtype.name, self.quant_type, *self._grouping)


def treat(config: QuantizationConfig | None, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Treatment:
    """Decide what becomes of a tensor.

    Floating tensors of two axes or more are quantized. Stacked norms and biases are not: tensors of two axes whose
    name has `norm`, or `ln` as a word, and does not end in `kernel` or `embedding`; and all whose name ends in `bias`.
    An override that matches, and has a quant_type, quantizes them too.

    Args:
        config: The model's config, or this tensor's, which has no overrides left; None leaves all as it is.
        name: The tensor's name.
        shape: The tensor's shape.
        dtype: The tensor's dtype.

    Raises:
        ConfigError: for an unknown solver.

    >>> config = QuantizationConfig("int4", group_size=32)
    >>> found = treat(config, "layers.dense.kernel", (4, 64), np.dtype("float32"))
    >>> found.spec, found.stored_bytes
    (QuantSpec(bits=4, per_channel=False, group_size=32, rotation=0), 192)
    >>> treat(config, "layers.norm.scale", (4, 64), np.dtype("float32")).vector
    True
    """
    if config is None:
        return Treatment(QuantizationConfig("none"), shape, dtype)
    policy = config.for_tensor(name)
    if not policy.coded:
        return Treatment(policy, shape, dtype, half=policy.quant_type == "fp16" and is_floating(dtype))
    if is_weight(config, name, shape, dtype):
        fit = config.for_tensor(name, shape)
        other = policy.quant_type if fit.quant_type != policy.quant_type else ""
        return Treatment(fit, shape, dtype, fit.spec_for(shape, name), quantizer_of(fit), instead_of=other)
    return Treatment(policy, shape, dtype, vector=len(shape) > 1 and is_floating(dtype))


def is_weight(config: QuantizationConfig, name: str, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Tell whether a tensor is one that is quantized, whatever its quant_type; see `treat`."""
    if len(shape) < 2 or not is_floating(dtype):
        return False
    norm = len(shape) == 2 and _NORM.search(name) is not None and not name.endswith(_WEIGHTS)
    vector = norm or name.lower().endswith("bias")
    return not vector or config.overrides_type(name)


def kept_notes(treatments: Mapping[str, Treatment]) -> list[str]:
    """Name the tensors of a model that are left alone, or have another code, though the config says otherwise."""
    notes = []
    if kept := [name for name, found in treatments.items() if found.vector]:
        notes.append(
            "kept as they are, being norms or biases by their names, though of two axes or more: "
            f"{some_of(kept, 20)}; an override with a quant_type quantizes them"
        )
    for asked in dict.fromkeys(found.instead_of for found in treatments.values() if found.instead_of):
        others = {name: found.quant_type for name, found in treatments.items() if found.instead_of == asked}
        notes.append(
            f"{', '.join(dict.fromkeys(others.values()))} instead of {asked}, which their shapes cannot have: "
            f"{some_of(list(others), 20)}"
        )
    return notes
