"""Prepare weights, once, for kernels that want them in another form."""

from __future__ import annotations

from typing import Literal

from jax.core import Tracer

from aq_jax.core.dispatch import Activations
from aq_jax.core.prepared import Prepared, prepare_weight, to_qtensor
from aq_jax.core.qtensor import QTensor
from aq_jax.ops.arguments import check_weight
from aq_jax.ops.kernels import choose_kernel
from aq_jax.ops.product import check_product
from aq_jax.ops.rows import check_rows


def prepare(
    q: QTensor | Prepared,
    *,
    activations: Activations = "float32",
    kernel: str | None = None,
    operation: Literal["product", "rows"] = "product",
) -> Prepared:
    """Prepare a weight for a kernel, once.

    `qdot` and `qembed` give a QTensor that nobody has prepared to a kernel that takes it as it is; only a kernel that
    you force prepares it in every call. The result replaces the QTensor in both of them, with any other kernel too, and
    is a pytree. Layers and models prepare their weights when they are built. `to_qtensor` restores the QTensor, bit for
    bit, and `aq_jax.save` and Orbax store that. XLA's kernels take QTensors as they are: then nothing is made, and no
    memory is used. A weight that is spread over several devices stays as it is, too.

    Args:
        q: A weight [outputs, inputs], or a table [rows, width].
        activations: The activations of the products to come (see `qdot`).
        kernel: The name of a kernel in `ops.KERNELS`; by default the first that takes the weight.
        operation: "rows" for a table that `qembed` will look rows up in.

    Raises:
        TypeError, ValueError, ConfigError: as for `qdot` and `qembed`; for an unknown operation.

    >>> import jax.numpy as jnp
    >>> from aq_jax import prepare, qdot, quantize
    >>> q = quantize(jnp.eye(3), "int8")
    >>> w = prepare(q)
    >>> qdot(jnp.array([3.0, 4.0, 5.0]), w).round(2).tolist(), w.shape
    ([3.0, 4.0, 5.0], (3, 3))
    """
    if operation not in ("product", "rows"):
        raise ValueError(f"prepare: operation={operation!r}; wanted 'product' or 'rows'")
    check_weight("prepare: q", q)
    q = to_qtensor(q)
    spread = not isinstance(q.codes, Tracer) and len(getattr(q.codes, "devices", set)()) > 1
    if spread and kernel is None:
        kernel = "xla"  # takes it as it is
    if operation == "rows":
        check_rows(q)
        name, entry = choose_kernel("rows", kernel, q)
    else:
        check_product(q, activations)
        name, entry = choose_kernel("product", kernel, q, activations)
    return prepare_weight(None if spread else entry, name, q)
