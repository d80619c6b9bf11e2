"""A weight as a kernel wants it: what was made of a QTensor once, beside it or instead of it."""

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
    """A QTensor, and what a kernel has prepared of it: `aq_jax.prepare` makes one.

    It is made again whenever a weight is loaded: what is saved, split, differentiated and exported is the QTensor.

    Args:
        weight: the QTensor; None where the arrays stand for it.
        arrays: what the kernel prepared, a pytree; None if it takes QTensors as they are.
        kernel: its name (static).
        maker: the entry of `ops.KERNELS` that prepared them, and makes the QTensor of them again (static).
        like: the QTensor, with shapes in the place of arrays (static).
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
        """Count the bytes in memory: what was prepared, and the QTensor if it is kept beside it."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def to_qtensor(self) -> QTensor:
        """Give the QTensor back, bit for bit."""
        if self.weight is not None:
            return self.weight
        return dataclasses.replace(self.maker.restore(self.arrays, unrotated(self.like)), spec=self.like.spec)

    def __repr__(self) -> str:
        return f"Prepared({self.kernel!r}, {self.like})"


Weight = TypeVar("Weight", bound=QTensor | Prepared)


def unrotated(w: Weight) -> Weight:
    """The same codes as a weight that is not rotated: kernels are given it so, and what they multiply is rotated."""
    if isinstance(w, QTensor):
        return dataclasses.replace(w, spec=dataclasses.replace(w.spec, rotation=0)) if w.spec.rotation else w
    weight = None if w.weight is None else unrotated(w.weight)
    return dataclasses.replace(w, weight=weight, like=unrotated(w.like))


def described(w: QTensor | Prepared) -> QTensor:
    """A QTensor to ask for sizes and numerics, whose arrays may be shapes."""
    return w.like if isinstance(w, Prepared) else w


def to_qtensor(w: QTensor | Prepared) -> QTensor:
    """The QTensor of a weight."""
    return w.to_qtensor() if isinstance(w, Prepared) else w


def prepared_by(maker: Any, kernel: str, q: QTensor) -> Prepared:
    """Prepare a weight for a kernel, if that has a form of its own.

    The QTensor is left out where the kernel can make it again: both would take twice the memory.
    """
    arrays = maker.prepare(unrotated(q)) if hasattr(maker, "prepare") else None
    kept = None if arrays is not None and hasattr(maker, "restore") else q
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), q)
    return Prepared(kept, arrays, kernel, maker, like)


def as_wanted(w: QTensor | Prepared, maker: Any, kernel: str) -> QTensor | Prepared:
    """Give a kernel what it wants: a QTensor, or what it has prepared, here and now if that was not done before."""
    if not hasattr(maker, "prepare"):
        return to_qtensor(w)
    if not isinstance(w, Prepared) or w.arrays is None or w.kernel != kernel:
        w = prepared_by(maker, kernel, to_qtensor(w))
    return w.weight if w.arrays is None else w
