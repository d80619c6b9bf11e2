"""The quantized tensor: packed codes and their grids, a pytree that jits, maps, scans and shards.

Only what the arrays cannot tell is static: the numerics and the length of the packed axis. A full static shape
would go stale under `vmap`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aq_jax.codes import bits_jax
from aq_jax.config import QuantSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """Codes and their grids: x ~ (q - zero_point) * scale, where their levels are evenly spaced.

    Args:
        codes: The codes in the layout of `spec.coding`. Elementwise codes are [*lead, bytes] uint8, the format's bit
            stream of each row, where rows are whole bytes; otherwise, and with eight bits, [*lead, length] int8.
        scale: Float32 of shape [*lead, groups] where groups divide a row of the last axis, otherwise [groups]. Some
            codes have another dtype, or other numbers for some groups at a time (`Code.grid_dtype`, `grid_block`).
        zero_point: Of the shape of `scale`, unless `Code.zero_shape` says otherwise, and of the code's `zero_dtype`;
            None where the code has none.
        spec: The numerics (static).
        length: The length of the last axis (static).
        rows: The number of rows of a matrix, where the shape of its codes does not tell it (static).

    Nothing is validated here: unflattening a pytree runs through this constructor. `quantize` and the loader
    check where data enters.

    >>> import jax.numpy as jnp
    >>> from aq_jax import quantize
    >>> q = quantize(jnp.ones((4, 8)), "int2")
    >>> q.shape, q.codes.shape, q.nbytes
    ((4, 8), (4, 2), 16)
    """

    # Leaves may be anything while a pytree is rebuilt, so the fields have no shapes to check.
    codes: Any
    scale: Any
    zero_point: Any
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    rows: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.coding.shape(self.codes.shape, self.length, self.rows)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values that the codes stand for."""
        return np.dtype(np.float32)

    @property
    def packed(self) -> bool:
        return self.codes.dtype == np.uint8

    @property
    def by_row(self) -> bool:
        """Tell whether each row of the last axis has its own groups; otherwise groups run over the flattened tensor."""
        if not self.scale.shape or self.scale.shape[:-1] != self.shape[:-1]:
            return False
        groups = self.row_groups
        return groups == 1 or groups * (self.spec.group_size or 1) == self.length

    @property
    def row_groups(self) -> int:
        """Count the groups of the last axis of `scale`."""
        groups, elements = self.spec.coding.grid_block
        return self.scale.shape[-1] // elements * groups

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes, scales and zero points in memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        # Leaves may be anything while a tree is mapped, shapes for example.
        shape = list(self.shape) if hasattr(self.codes, "shape") else [..., self.length]
        return f"QTensor({self.spec.quant_type}{shape}, {self.spec})"


def _to_json(static: tuple[Any, ...]) -> bytes:
    spec, length, rows = static
    return json.dumps({"spec": spec.to_dict(), "length": length} | ({} if rows is None else {"rows": rows})).encode()


def _from_json(data: bytes) -> tuple[QuantSpec, int, int | None]:
    static = json.loads(data)
    return QuantSpec(**static["spec"]), static["length"], static.get("rows")


# Without this, exported functions that take or return QTensors could not be written to files.
jax.export.register_pytree_node_serialization(
    QTensor, serialized_name="aq_jax.QTensor", serialize_auxdata=_to_json, deserialize_auxdata=_from_json
)


def scale_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Compute the shape of a tensor's scale (see QTensor)."""
    *lead, groups = group_shape(shape, spec)
    return (*lead, spec.coding.grid_count(groups))


def zero_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Compute the shape of a tensor's zero point, of a code that has them (see QTensor)."""
    return spec.coding.zero_shape(group_shape(shape, spec))


def group_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Compute the shape of a tensor's groups, those of the last axis last (see QTensor)."""
    size = min(spec.group_elements(shape), max(1, math.prod(shape)))
    if shape and math.prod(shape) and shape[-1] % size == 0:
        return (*shape[:-1], shape[-1] // size)
    return (spec.group_count(shape),)


def check_layout(q: QTensor) -> None:
    """Refuse a batch of tensors, made by `vmap`, whose groups cross rows: it has no layout of one tensor.

    Raises:
        ValueError: naming both shapes; such a batch is decoded with `jax.vmap`, and stored one by one.
    """
    if not q.by_row and q.scale.shape != (q.spec.coding.grid_count(q.spec.group_count(q.shape)),):
        raise ValueError(
            f"scales of shape {list(q.scale.shape)} do not belong to one tensor of shape {list(q.shape)}; if this is a "
            "batch of tensors whose groups cross rows, use jax.vmap(dequantize), and save them one by one"
        )


def to_groups(w: Float[Array, "*shape"], spec: QuantSpec) -> tuple[Float[Array, "*groups size"], np.ndarray]:
    """Reshape a weight to one row a group, and count the padding elements of each group.

    A short last group is padded with its own last element: that changes no range, and a sum over the group can
    subtract it.
    """
    shape = w.shape
    grids = scale_shape(shape, spec)
    count = math.prod(grids)
    size = min(spec.group_elements(shape), w.size)
    short = count * size - w.size
    pads = np.zeros(grids, np.float32)
    if short:
        pads.reshape(-1)[-1] = short
        w = jnp.pad(w.reshape(-1), (0, short), mode="edge")
    return w.reshape(*grids, size), pads


def from_groups(groups: Float[Array, "*groups size"], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Undo `to_groups`: drop the padding of a short last group."""
    count = math.prod(shape)
    return (groups if groups.size == count else groups.reshape(-1)[:count]).reshape(shape)


def assemble_qtensor(
    codes: Float[Array, "*groups size"],
    scale: Float[Array, "*groups"],
    zero_point: Float[Array, "*groups"] | None,
    shape: tuple[int, ...],
    spec: QuantSpec,
) -> QTensor:
    """Make a QTensor from codes in groups: restore the tensor's shape, then pack (see `bits_jax.pack`).

    Args:
        codes: One code an element.
        scale: The scale of each group.
        zero_point: The zero point of each group; dropped where the code has none.
        shape: The tensor's shape.
        spec: The tensor's numerics.
    """
    codes = from_groups(codes, shape)
    packed = spec.coding.codes_like(shape)[1] == "uint8"
    zeros = zero_point if spec.coding.zero_points else None
    return QTensor(bits_jax.pack(codes, spec.bits if packed else 8), scale, zeros, spec, shape[-1])
