"""Look rows up in a quantized table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from aq_jax.codes.rotation_jax import unrotate
from aq_jax.core.prepared import Prepared, as_wanted, described, unrotated
from aq_jax.core.qtensor import QTensor, check_layout
from aq_jax.ops.kernels import Kernel, choose


def qembed(
    table: QTensor | Prepared, ids: Integer[Array | np.ndarray, "*batch"], *, kernel: str | None = None
) -> Float[Array, "*batch width"]:
    """Rows of an embedding table: gathered as codes, dequantized after.

    Args:
        table: [rows, width]; also as `prepare` makes it.
        ids: row numbers; negative ones count from the end. An id outside the table gives a row of NaN, since
            nothing can be raised in compiled code.
        kernel: who computes it, of `ops.KERNELS["rows"]`; chosen as in `qdot`.

    Raises:
        ValueError: if the table has other than two axes.
        ConfigError: for a kernel that is not there, or if none takes this table: its groups cross rows, and it has
            over 2^31 elements.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qembed, quantize
    >>> qembed(quantize(jnp.eye(3), "int8"), jnp.array([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    check_rows(table)
    first = table.kernel if isinstance(table, Prepared) else ""
    name, entry = choose("rows", kernel, described(table), first=first)
    return _qembed(table, ids, name, entry)


def check_rows(table: QTensor | Prepared) -> None:
    """Refuse what is no table.

    Raises:
        ValueError: see `qembed`.
    """
    if table.ndim != 2:
        raise ValueError(f"qembed: table of shape {list(table.shape)}: wanted [rows, width]")
    check_layout(described(table))


@functools.partial(jax.jit, static_argnames=("name", "kernel"))
def _qembed(
    table: QTensor | Prepared, ids: Integer[Array, "*batch"], name: str, kernel: Kernel
) -> Float[Array, "*batch width"]:
    rows = table.shape[0]
    if ids.dtype.itemsize < 4:  # may not be able to count the rows
        ids = ids.astype(jnp.int32)
    elif jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.minimum(ids, rows).astype(jnp.int32)
    inside = (ids >= -rows) & (ids < rows)
    wrapped = jnp.where(inside, jnp.where(ids < 0, ids + rows, ids), rows)
    found = kernel.run(as_wanted(unrotated(table), kernel, name), wrapped, inside)
    rotation = described(table).spec.rotation
    return unrotate(found, rotation) if rotation else found
