"""Name what inputs are rounded to, and the settings that depend on the processor, which change no result.

`Activations` says what a product's inputs are rounded to; nothing else does, neither the machine nor the number of rows
(docs/decisions/0006). The best sizes and compiler options stand in one table each.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

Activations = Literal["float32", "bfloat16", "int8"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
# An integer dot is padded to this many rows: with fewer, XLA falls back to a scalar loop.
MIN_ROWS = 8

# Tokens in one call of a model: on a CPU, as many as have activations that fit in its caches; measured on an H100.
TOKENS: Mapping[str, int] = types.MappingProxyType({"cpu": 512, "gpu": 16384, "tpu": 16384})
# Texts that would fill less than half of such a call run in calls of so many tokens, or of one text. On an H100 a call
# of 1 x 16 tokens takes 1 ms, and so does one of 16 x 64: the time is that of starting its programs.
FEW_TOKENS: Mapping[str, int] = types.MappingProxyType({"cpu": 0, "gpu": 1024, "tpu": 1024})
# Options for programs of whole models. XLA's default on a CPU keeps all dequantized weights in memory at the same time:
# for MiniLM 42 MB instead of 2.6, and, on fresh pages in every call, four times slower at one sentence.
COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}, "gpu": {}, "tpu": {}}
)


def backend() -> str:
    """Name the platform of this process's default device; an unknown one counts as a GPU.

    >>> backend() in TOKENS
    True
    """
    platform = jax.default_backend()
    return platform if platform in TOKENS else "gpu"


def product_dtype(activations: Activations) -> DTypeLike:
    """Choose the dtype in which attention multiplies: bfloat16 if it was asked for, else float32.

    >>> [jnp.dtype(product_dtype(activations)).name for activations in ACTIVATIONS]
    ['float32', 'bfloat16', 'float32']
    """
    return jnp.bfloat16 if activations == "bfloat16" else jnp.float32
