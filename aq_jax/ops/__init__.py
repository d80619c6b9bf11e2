"""Operations on quantized weights, and the kernels that compute them.

product        x @ W.T for a packed W
rows           rows of a packed table
attention      over whole texts, and over a cache
cached         keys and values of the tokens so far
scores         how an attention scores keys, and which of them a token sees
values         codes to values
epilogue       what follows a product, in one call with it
preparing      weights in the form that a kernel wants
kernels        KERNELS: the kernels of each operation
xla, xla_...   the kernels that every backend has
native, ...    those of C++, for one CPU
"""

from aq_jax.core.prepared import Prepared
from aq_jax.ops.attention import attention, cached_attention
from aq_jax.ops.cached import Cached, CacheType, check_cache_type
from aq_jax.ops.epilogue import ACTS, Epilogue, layer_norm
from aq_jax.ops.kernels import KERNELS
from aq_jax.ops.preparing import prepare
from aq_jax.ops.product import MAX_PRODUCTS, integer_dot_needs, linear, qdot
from aq_jax.ops.rows import qembed
from aq_jax.ops.scores import Scores
from aq_jax.ops.values import dequantize

__all__ = [
    "ACTS",
    "KERNELS",
    "MAX_PRODUCTS",
    "CacheType",
    "Cached",
    "Epilogue",
    "Prepared",
    "Scores",
    "attention",
    "cached_attention",
    "check_cache_type",
    "dequantize",
    "integer_dot_needs",
    "layer_norm",
    "linear",
    "prepare",
    "qdot",
    "qembed",
]
