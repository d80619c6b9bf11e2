"""What models do with quantized weights, and who computes it.

product    x @ W.T for a packed W
rows       rows of a packed table
kernels    KERNELS: by operation, those who compute it
xla        the ones that every backend has
"""

from aq_jax.ops.kernels import KERNELS
from aq_jax.ops.product import MOST_PRODUCTS, lacks_for_integers, qdot
from aq_jax.ops.rows import qembed

__all__ = ["KERNELS", "MOST_PRODUCTS", "lacks_for_integers", "qdot", "qembed"]
