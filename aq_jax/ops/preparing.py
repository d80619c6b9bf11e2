"""Weights for kernels that want them in another form, which is made once."""

from __future__ import annotations

from typing import Literal

from jax.core import Tracer

from aq_jax.core.dispatch import Activations
from aq_jax.core.prepared import Prepared, prepared_by, to_qtensor
from aq_jax.core.qtensor import QTensor
from aq_jax.ops.kernels import choose
from aq_jax.ops.product import check_product
from aq_jax.ops.rows import check_rows


def prepare(
    q: QTensor | Prepared,
    *,
    activations: Activations = "float32",
    kernel: str | None = None,
    operation: Literal["product", "rows"] = "product",
) -> Prepared:
    """Make of a weight what a kernel wants, once: `qdot` and `qembed` would make it in every call.

    It stands for the QTensor in both of them, with any other kernel too, and is a pytree; layers and models prepare
    their weights when they are built. `to_qtensor` gives the QTensor back, bit for bit; `aq_jax.save` and Orbax store
    that. XLA's kernels take QTensors as they are: there is nothing to make then, and no byte more in memory. A weight
    that is spread over several devices stays as it is, too.

    Args:
        q: [outputs, inputs], or a table of [rows, width].
        activations: of the products to come (see `qdot`).
        kernel: who will compute them, of `ops.KERNELS`; by default the first that takes them.
        operation: "rows" for a table that `qembed` will look rows up in.

    Raises:
        ValueError, ConfigError: as `qdot`, and `qembed`.

    >>> import jax.numpy as jnp
    >>> from aq_jax import prepare, qdot, quantize
    >>> q = quantize(jnp.eye(3), "int8")
    >>> w = prepare(q)
    >>> qdot(jnp.array([3.0, 4.0, 5.0]), w).round(2).tolist(), w.nbytes == q.nbytes
    ([3.0, 4.0, 5.0], True)
    """
    q = to_qtensor(q)
    if operation == "rows":
        check_rows(q)
        name, entry = choose("rows", kernel, q)
    else:
        check_product(q, activations)
        name, entry = choose("product", kernel, q, activations)
    spread = not isinstance(q.codes, Tracer) and len(getattr(q.codes, "devices", set)()) > 1
    return prepared_by(None if spread else entry, name, q)
