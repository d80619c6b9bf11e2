"""What becomes of a tensor under a model's config: decided here, by its name, shape and dtype, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aq_jax.config import QuantizationConfig, QuantSpec
from aq_jax.quantizers import Entry
from aq_jax.quantizers.lookup import quantizer_of
from aq_jax.quantizers.screen import is_floating

# Stacked over layers or heads, norms have two axes and biases two or more. "ln" is a word of its own, as in ln_1, ln_f.
# Flax calls weights kernel and embedding, wherever they are: a norm that is computed from something has them, too.
_NORM = re.compile(r"norm|(?<![a-z])ln(?![a-z])", re.IGNORECASE)
_WEIGHTS = ("kernel", "embedding")
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Treatment:
    """What becomes of one tensor.

    Args:
        policy: of this tensor (`QuantizationConfig.for_tensor`).
        spec: the numerics of its codes; None if it is not quantized.
        quantizer: what chooses its codes; None if it is not quantized.
        half: whether it is kept in float16, if that can hold it.
        vector: whether it is left alone for being a norm or a bias by its name, although its axes are those of weights.
    """

    policy: QuantizationConfig
    spec: QuantSpec | None = None
    quantizer: Entry | None = None
    half: bool = False
    vector: bool = False


def treat(config: QuantizationConfig, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Treatment:
    """Decide what becomes of a tensor.

    Floating tensors of two axes or more are quantized. Stacked norms and biases are not: of two axes, their name saying
    `norm`, or `ln` as a word, but not that it is a `kernel` or an `embedding` in the end; or of any number, their name
    ending in `bias`. An override that matches, and has a quant_type, quantizes them too.

    Args:
        config: of the model, or of this tensor, no override being left then.
        name: of the tensor.
        shape: of the tensor.
        dtype: of the tensor.

    Raises:
        ConfigError: for a solver that is none.

    >>> config = QuantizationConfig("int4", group_size=32)
    >>> treat(config, "layers.dense.kernel", (4, 64), np.dtype("float32")).spec
    QuantSpec(bits=4, per_channel=False, group_size=32, rotation=0)
    >>> treat(config, "layers.norm.scale", (4, 64), np.dtype("float32")).vector
    True
    """
    policy = config.for_tensor(name)
    if not policy.coded:
        return Treatment(policy, half=policy.quant_type == "fp16" and is_floating(dtype))
    if is_weight(config, name, shape, dtype):
        return Treatment(policy, policy.spec_for(shape, name), quantizer_of(policy))
    return Treatment(policy, vector=len(shape) > 1 and is_floating(dtype))


def is_weight(config: QuantizationConfig, name: str, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether a tensor is one of those that are quantized, whatever quant_type it has; see `treat`."""
    if len(shape) < 2 or not is_floating(dtype):
        return False
    norm = len(shape) == 2 and _NORM.search(name) is not None and not name.endswith(_WEIGHTS)
    vector = norm or name.lower().endswith("bias")
    return not vector or config.overrides_type(name)


def vectors_note(names: Sequence[str]) -> str:
    """Say which tensors of a model are left alone for being norms or biases by their names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        "kept as they are, being norms or biases by their names, though of two axes or more: "
        f"{', '.join(names[:_SHOWN])}{more}; an override with a quant_type quantizes them"
    )
