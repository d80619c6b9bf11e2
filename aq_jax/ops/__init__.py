"""What is computed with quantized weights, and who computes it.

product        x @ W.T for a packed W
rows           rows of a packed table
attention      over whole texts, and over a cache
values         codes to values
preparing      weights in the form that a kernel wants, made once
kernels        KERNELS: by operation, those who compute it
xla, xla_...   the ones that every backend has
"""

from aq_jax.core.prepared import Prepared
from aq_jax.ops.attention import attention, cached_attention
from aq_jax.ops.kernels import KERNELS
from aq_jax.ops.preparing import prepare
from aq_jax.ops.product import MOST_PRODUCTS, lacks_for_integers, qdot
from aq_jax.ops.rows import qembed
from aq_jax.ops.values import dequantize

__all__ = [
    "KERNELS",
    "MOST_PRODUCTS",
    "Prepared",
    "attention",
    "cached_attention",
    "dequantize",
    "lacks_for_integers",
    "prepare",
    "qdot",
    "qembed",
]
