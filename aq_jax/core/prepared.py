"""Weights that a kernel has prepared: arrays made from a QTensor once, kept beside it or instead of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from aq_jax.core.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """A QTensor and the arrays that a kernel prepared from it; `aq_jax.prepare` makes one.

    It is made anew whenever a weight is loaded: saving, splitting, differentiating and exporting use the QTensor.

    Args:
        weight: The QTensor; None where the arrays stand for it.
        arrays: A pytree of the arrays that the kernel prepared; None if it takes QTensors as they are.
        kernel: The kernel's name (static).
        maker: The entry of `ops.KERNELS` that prepared the arrays, and can restore the QTensor from them (static).
        like: The QTensor with shapes instead of arrays (static).
    """

    # Leaves may be anything while a pytree is rebuilt, so the fields have no types to check.
    weight: Any
    arrays: Any
    kernel: str = dataclasses.field(metadata={"static": True})
    maker: Any = dataclasses.field(metadata={"static": True})
    like: QTensor = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.like.shape

    @property
    def ndim(self) -> int:
        return self.like.ndim

    @property
    def size(self) -> int:
        return self.like.size

    @property
    def dtype(self) -> np.dtype:
        return self.like.dtype

    @property
    def nbytes(self) -> int:
        """Count the bytes in memory: the prepared arrays, and the QTensor if it is kept."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def to_qtensor(self) -> QTensor:
        """Restore the QTensor, bit for bit."""
        if self.weight is not None:
            return self.weight
        return dataclasses.replace(self.maker.restore(self.arrays, unrotated(self.like)), spec=self.like.spec)

    def __repr__(self) -> str:
        return f"Prepared({self.kernel!r}, {self.like})"


Weight = TypeVar("Weight", bound=QTensor | Prepared)


def unrotated(w: Weight) -> Weight:
    """Drop the rotation from a weight's numerics and keep its codes: kernels multiply rotated inputs by it."""
    if isinstance(w, QTensor):
        return dataclasses.replace(w, spec=dataclasses.replace(w.spec, rotation=0)) if w.spec.rotation else w
    weight = None if w.weight is None else unrotated(w.weight)
    return dataclasses.replace(w, weight=weight, like=unrotated(w.like))


def abstract_qtensor(w: QTensor | Prepared) -> QTensor:
    """Give a QTensor that knows sizes and numerics; its arrays may be shapes."""
    return w.like if isinstance(w, Prepared) else w


def to_qtensor(w: QTensor | Prepared) -> QTensor:
    """Give the QTensor of a weight."""
    return w.to_qtensor() if isinstance(w, Prepared) else w


def prepare_weight(maker: Any, kernel: str, q: QTensor) -> Prepared:
    """Prepare a weight for a kernel, if the kernel wants a form of its own.

    The QTensor is dropped if the kernel can restore it: keeping both would take twice the memory.
    """
    arrays = maker.prepare(unrotated(q)) if hasattr(maker, "prepare") else None
    kept = None if arrays is not None and hasattr(maker, "restore") else q
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), q)
    return Prepared(kept, arrays, kernel, maker, like)


def for_kernel(w: QTensor | Prepared, maker: Any, kernel: str) -> QTensor | Prepared:
    """Give a kernel the form that it wants: a QTensor, or prepared arrays, which are made now if they are not there."""
    if not hasattr(maker, "prepare"):
        return to_qtensor(w)
    if not isinstance(w, Prepared) or w.arrays is None or w.kernel != kernel:
        w = prepare_weight(maker, kernel, to_qtensor(w))
    return w.weight if w.arrays is None else w
