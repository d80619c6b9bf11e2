"""Look rows up in a quantized table."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from aq_jax.codes.rotation_jax import unrotate
from aq_jax.core.qtensor import QTensor, check_layout
from aq_jax.ops.kernels import KERNELS, choose


def qembed(
    table: QTensor, ids: Integer[Array | np.ndarray, "*batch"], *, kernel: str | None = None
) -> Float[Array, "*batch width"]:
    """Rows of an embedding table: gathered as codes, dequantized after.

    Args:
        table: [rows, width].
        ids: row numbers; negative ones count from the end. An id outside the table gives a row of NaN, since
            nothing can be raised in compiled code.
        kernel: who computes it, of `ops.KERNELS["rows"]`; by default the first that takes it.

    Raises:
        ValueError: if the table has other than two axes.
        ConfigError: for a kernel that is not there, or if none takes this table: its groups cross rows, and it has
            over 2^31 elements.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qembed, quantize
    >>> qembed(quantize(jnp.eye(3), "int8"), jnp.array([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if table.ndim != 2:
        raise ValueError(f"qembed: table of shape {list(table.shape)}: wanted [rows, width]")
    check_layout(table)
    return _qembed(table, ids, choose("rows", kernel, table))


@functools.partial(jax.jit, static_argnames="kernel")
def _qembed(table: QTensor, ids: Integer[Array, "*batch"], kernel: str) -> Float[Array, "*batch width"]:
    rows = table.shape[0]
    if ids.dtype.itemsize < 4:  # may not be able to count the rows
        ids = ids.astype(jnp.int32)
    elif jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.minimum(ids, rows).astype(jnp.int32)
    inside = (ids >= -rows) & (ids < rows)
    wrapped = jnp.where(inside, jnp.where(ids < 0, ids + rows, ids), rows)
    plain = dataclasses.replace(table, spec=dataclasses.replace(table.spec, rotation=0))
    found = KERNELS["rows"][kernel].run(plain, wrapped, inside)
    return unrotate(found, table.spec.rotation) if table.spec.rotation else found
