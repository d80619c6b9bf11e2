"""Look rows up in a quantized table."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from aq_jax.codes.rotation_jax import unrotate
from aq_jax.core.prepared import Prepared, abstract_qtensor, for_kernel, unrotated
from aq_jax.core.qtensor import QTensor, check_layout
from aq_jax.ops.arguments import check_numbers, check_weight
from aq_jax.ops.kernels import choices, choose_kernel


def qembed(
    table: QTensor | Prepared, ids: Integer[Array | np.ndarray, "*batch"], *, kernel: str | None = None
) -> Float[Array, "*batch width"]:
    """Look up rows of an embedding table: gather their codes, then dequantize them.

    Args:
        table: The table [rows, width], or the result of `prepare`.
        ids: Row numbers; negative ones count from the end. An id outside the table gives a row of NaN, since compiled
            code can raise nothing.
        kernel: The name of a kernel in `ops.KERNELS["rows"]`; chosen as in `qdot`.

    Raises:
        ValueError: if the table does not have two axes.
        TypeError: for ids that are no integers, and a table that is not quantized.
        ConfigError: for an unknown kernel, or if none takes this table: its groups cross rows, and it has over 2^31
            elements.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qembed, quantize
    >>> qembed(quantize(jnp.eye(3), "int8"), jnp.array([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if isinstance(ids, np.ndarray) and ids.dtype.itemsize == 8 and ids.dtype.kind in "iu":
        # JAX would keep their lower halves, unless it computes in 64 bits. No table has as many rows.
        most = np.iinfo(np.int32)
        ids = np.clip(ids, 0 if ids.dtype.kind == "u" else most.min, most.max).astype(np.int32)
    return _qembed(table, ids, kernel, choices("rows"))


def check_rows(table: QTensor | Prepared) -> None:
    """Refuse a QTensor that is not a table.

    Raises:
        ValueError: see `qembed`.
    """
    if table.ndim != 2:
        raise ValueError(f"qembed: table of shape {list(table.shape)}: wanted [rows, width]")
    check_layout(abstract_qtensor(table))


# Arguments are checked when it is traced, as in `qdot`.
@functools.partial(jax.jit, static_argnames=("kernel", "chosen"))
def _qembed(
    table: QTensor | Prepared, ids: Integer[Array, "*batch"], kernel: str | None, chosen: Hashable
) -> Float[Array, "*batch width"]:
    check_weight("qembed: the table", table)
    check_numbers("qembed: ids", ids, whole=True)
    check_rows(table)
    name, entry = choose_kernel("rows", kernel, abstract_qtensor(table), weight=table)
    rows = table.shape[0]
    if not ids.size or not rows:  # no id is inside, if there is one
        return jnp.full((*ids.shape, table.shape[1]), jnp.nan, jnp.float32)
    if ids.dtype.itemsize < 4:  # may not be able to count the rows
        ids = ids.astype(jnp.int32)
    elif jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.minimum(ids, rows).astype(jnp.int32)
    inside = (ids >= -rows) & (ids < rows)
    wrapped = jnp.where(inside, jnp.where(ids < 0, ids + rows, ids), rows)
    found = entry.run(for_kernel(unrotated(table), entry, name), wrapped, inside)
    rotation = abstract_qtensor(table).spec.rotation
    return unrotate(found, rotation) if rotation else found
