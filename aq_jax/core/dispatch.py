"""Which formulation of a product runs where: one table, beside the measurements that made it.

Measured as speed over the float32 dot of a float32 weight already in memory, one thread, rows of x = 1 / 8 / 32 / 512:

                                            384 x 1536                    2048 x 2048
  "cpu": AVX2 without integer dot products (AMD Zen 3, jaxlib 0.10.2; `python -m benchmarks qdot` measures it again)
    int8 weight, x float32                  1.7 / 1.1 / 1.0 / 1.0         2.3 / 0.7 / 0.8 / 0.9
    int8 weight, x bfloat16                 1.1 / 1.0 / 1.0 / 1.0         1.2 / 0.7 / 0.8 / 1.0
    int8 weight, x int8                     0.9 / 1.9 / 1.3 / 1.0         0.9 / 1.4 / 1.3 / 1.1
    int4 g128, x float32                    0.6 / 0.8 / 0.8 / 1.0         0.5 / 0.5 / 0.7 / 1.0
    int4 g128, x int8                       0.4 / 0.9 / 0.8 / 0.8         0.3 / 0.5 / 0.7 / 0.7
  "cpu", once more: AVX-512 with VNNI and bfloat16, no AMX (AMD EPYC, the same jaxlib)
    int8 weight, x float32                  1.6 / 1.3 / 1.2 / 1.1         3.3 / 0.9 / 0.9 / 1.0
    int8 weight, x bfloat16                 0.9 / 1.5 / 1.2 / 1.2         1.6 / 0.9 / 0.8 / 1.0
    int8 weight, x int8                     0.9 / 2.6 / 2.0 / 1.6         1.6 / 5.6 / 1.4 / 1.5
    int4 g128, x float32                    0.4 / 1.1 / 1.0 / 1.0         0.7 / 0.8 / 0.8 / 1.0
    int4 g128, x int8                       0.3 / 1.2 / 1.1 / 1.2         0.2 / 1.0 / 0.8 / 0.8
  "cpu+int8": AMX (rows 1 / 32 / 512; 384 x 1536, 4096 x 4096; symmetric x, a prototype)
    int8 weight, x float32 or bfloat16      <= 1.0 / 0.5-4.2              <= 0.9 / 0.2-2.3
    int8 weight, x int8                     1.8 / 4.4 / 6.2               8.1 / 13.2 / 7.8
    bfloat16 weight, x bfloat16             0.5 / 3.5 / 5.9               0.3 / 2.6-5.6 / 3.1-4.1

A dequantized weight is written out on every call; only one row is multiplied as the codes are read. Integer dots fall
to a scalar loop at few rows, so that rows are filled up to FEWEST_ROWS. Neither [out, in] nor [in, out] codes won:
weights stay as the table has them (docs/decisions/0006).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

Activations = Literal["float32", "bfloat16", "int8"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
FEWEST_ROWS = 8

# Backend -> (bits of the weight, at least; rows of x, at least; what x is rounded to): the first that fits.
TABLE: Mapping[str, tuple[tuple[int, int, Activations], ...]] = types.MappingProxyType(
    {
        "cpu": ((8, 2, "int8"), (2, 1, "float32")),
        "cpu+int8": ((8, 1, "int8"), (2, 32, "bfloat16"), (2, 1, "float32")),
        "gpu": ((2, 1, "bfloat16"),),  # not measured
        "tpu": ((2, 1, "bfloat16"),),  # not measured
    }
)
# Products of two activations, as in attention, beside W8A8 or bfloat16 linears.
PRODUCTS: Mapping[str, DTypeLike] = types.MappingProxyType(
    {"cpu": jnp.float32, "cpu+int8": jnp.bfloat16, "gpu": jnp.bfloat16, "tpu": jnp.bfloat16}
)
# Tokens that a model is given at once: on a CPU, what its caches hold of activations.
TOKENS: Mapping[str, int] = types.MappingProxyType({"cpu": 512, "cpu+int8": 512, "gpu": 16384, "tpu": 16384})
# Of the programs of whole models. XLA's default on a CPU keeps all dequantized weights in memory at the same time: for
# MiniLM 42 MB instead of 2.6, and, on fresh pages in every call, four times slower at one sentence.
_CPU = types.MappingProxyType({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})
COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {"cpu": _CPU, "cpu+int8": _CPU, "gpu": {}, "tpu": {}}
)


@functools.cache
def backend() -> str:
    """The key of this process's default device: the platform; of a CPU, whether it has AMX, which multiplies bytes."""
    platform = jax.default_backend()
    if platform != "cpu":
        return platform if platform in TABLE else "gpu"
    info = Path("/proc/cpuinfo")
    return "cpu+int8" if info.exists() and "amx_int8" in info.read_text().split() else "cpu"


def choose(bits: int, rows: int) -> Activations:
    """What the table says for a weight of so many bits and so many rows of x.

    >>> choose(bits=8, rows=512) in ACTIVATIONS
    True
    """
    return next(how for least, few, how in TABLE[backend()] if bits >= least and max(1, rows) >= few)


def product_dtype(activations: Activations) -> DTypeLike:
    """The dtype in which attention multiplies: float32 wherever everything else is."""
    return jnp.float32 if activations == "float32" else PRODUCTS[backend()]
