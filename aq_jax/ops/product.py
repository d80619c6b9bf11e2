"""Multiply by a quantized weight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from aq_jax.codes.rotation_jax import rotate
from aq_jax.core.dispatch import ACTIVATIONS, Activations
from aq_jax.core.prepared import Prepared, abstract_qtensor, for_kernel, to_qtensor, unrotated
from aq_jax.core.qtensor import QTensor
from aq_jax.ops.arguments import check_numbers, check_weight
from aq_jax.ops.epilogue import ACTS, Epilogue
from aq_jax.ops.kernels import Kernel, choices, choose_kernel
from aq_jax.ops.xla import float32_dot

# Products of two int8 numbers in one sum; a few more may not fit in int32.
MAX_PRODUCTS = 2**17 - 1


def qdot(
    x: Real[Array | np.ndarray, "*batch inputs"],
    w: QTensor | Prepared,
    activations: Activations = "float32",
    *,
    kernel: str | None = None,
) -> Float[Array, "*batch outputs"]:
    """Compute x @ W.T for a weight stored as [outputs, inputs], as in PyTorch and this format.

    Sums are taken in float32, or in int32 where both sides are integers; the result has x's dtype, or float32 where x
    is not floating. Derivatives are those of the float32 product, whatever x was rounded to.

    Args:
        x: Real inputs, whose last axis is as long as W's.
        w: The weight [outputs, inputs], or the result of `prepare`.
        activations: The type that x is rounded to before the product. "float32" is exact on a CPU; an accelerator
            multiplies as `jax_default_matmul_precision` says, by default with fewer bits. "bfloat16" also rounds W.
            "int8" gives each row of x its own scale and offset, so that a row's result depends on no other row
            (vector-wise quantization of LLM.int8(), arXiv:2208.07339, on the row's range as in minmax), and
            multiplies it by the codes of W as integers; the relative error of a product is then about 1 %.
        kernel: The name of a kernel in `ops.KERNELS["product"]`; by default the one that W was prepared for, or else
            the first that takes it as it is. The choice changes no more than the order of sums, as long as no product
            and no sum is out of float32's range. In your own function under `jit`, the kernel is chosen when the
            function is traced.

    Raises:
        ValueError: if W does not have two axes, or x has another length; for unknown activations; for "int8" if the
            groups of W cross its rows, or a sum has over 131071 products.
        TypeError: for an x of no real numbers, and a W that is not quantized.
        ConfigError: for an unknown kernel, and for one that does not take this weight.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qdot, quantize
    >>> w = quantize(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), "int8")
    >>> qdot(jnp.array([3.0, 4.0]), w).round(2).tolist()
    [3.0, 4.0, 7.0]
    """
    return _qdot(x, w, activations, kernel, choices("product"))


# Arguments are checked when it is traced: in Python, that would take as long as a small product.
@functools.partial(jax.jit, static_argnames=("activations", "kernel", "chosen"))
def _qdot(
    x: Real[Array, "*batch inputs"], w: QTensor | Prepared, activations: str, kernel: str | None, chosen: Hashable
) -> Float[Array, "*batch outputs"]:
    check_weight("qdot: W", w)
    check_numbers("qdot: x", x)
    if w.ndim != 2 or x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"qdot: x of shape {list(x.shape)} and W of shape {list(w.shape)}: wanted [..., n] and [m, n]")
    check_product(w, activations)
    return linear(x, w, cast(Activations, activations), Epilogue(), kernel=kernel)


def linear(
    x: Real[Array | np.ndarray, "*batch inputs"],
    w: QTensor | Prepared,
    activations: Activations,
    after: Epilogue,
    *,
    kernel: str | None = None,
) -> Float[Array, "*batch outputs"]:
    """Compute `qdot`, and what follows it, in float32, for arguments that are known to fit each other.

    A factor and a residual have the shape of the result.

    Raises:
        ValueError: for an unknown activation, a normalization without both of its arrays, and arrays of other shapes.
        ConfigError: as `qdot`.
    """
    check_epilogue(after, (*x.shape[:-1], w.shape[0]))
    name, entry = choose_kernel("product", kernel, abstract_qtensor(w), activations, weight=w)
    return _linear(x, w, after, activations, name, entry)


def check_epilogue(after: Epilogue, shape: tuple[Any, ...]) -> None:
    """Refuse what cannot follow a product of this shape, which may have symbols for lengths.

    Raises:
        ValueError: see `linear`.
    """
    if after.act not in ACTS:
        raise ValueError(f"act={after.act!r}; wanted one of {', '.join(map(repr, ACTS))}")
    if (after.gain is None) != (after.shift is None):
        raise ValueError("a normalization wants both a gain and a shift; found one of them")
    wanted = {"bias": shape[-1:], "gain": shape[-1:], "shift": shape[-1:], "factor": shape, "residual": shape}
    for name, its in wanted.items():
        found = getattr(after, name)
        if found is not None and found.shape != its:
            raise ValueError(f"{name} of shape {list(found.shape)} after a product of shape {list(shape)}")


def check_product(w: QTensor | Prepared, activations: str) -> None:
    """Refuse a weight that cannot be multiplied by such inputs.

    Raises:
        ValueError: see `qdot`.
    """
    if w.ndim != 2:
        raise ValueError(f"qdot: W of shape {list(w.shape)}: wanted [outputs, inputs]")
    if activations not in ACTIVATIONS:
        raise ValueError(f"qdot: activations={activations!r}; wanted one of {', '.join(ACTIVATIONS)}")
    if activations == "int8" and w.size and (wanted := integer_dot_needs(abstract_qtensor(w))):
        raise ValueError(f"qdot: integer products need {wanted}; found {w}")


@functools.partial(jax.jit, static_argnames=("activations", "name", "kernel"))
def _linear(
    x: Real[Array, "*batch inputs"],
    w: QTensor | Prepared,
    after: Epilogue,
    activations: Activations,
    name: str,
    kernel: Kernel,
) -> Float[Array, "*batch outputs"]:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(jnp.float32)
    if not getattr(kernel, "rotates", False):
        rows, w = _rotate_inputs(rows, w)
    if w.size == 0:
        activations = "float32"  # there is nothing to round
    flat = (rows.shape[0], w.shape[0])
    factor, residual = (None if part is None else part.reshape(flat) for part in (after.factor, after.residual))
    after = dataclasses.replace(after, factor=factor, residual=residual)
    after = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), after)
    y = _product(rows, w, after, activations, name, kernel).reshape(*x.shape[:-1], w.shape[0])
    return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else y


def _rotate_inputs(rows: Array, w: QTensor | Prepared) -> tuple[Array, QTensor | Prepared]:
    """Rotate inputs instead of the weight: x W^T = (x R)(W R)^T."""
    rotation = abstract_qtensor(w).spec.rotation
    return (rotate(rows, rotation), unrotated(w)) if rotation else (rows, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _product(
    x: Float[Array, "rows inputs"],
    w: QTensor | Prepared,
    after: Epilogue,
    activations: Activations,
    name: str,
    kernel: Kernel,
) -> Float[Array, "rows outputs"]:
    return kernel.run(x, for_kernel(w, kernel, name), activations, after)


@_product.defjvp
def _product_jvp(
    activations: Activations, name: str, kernel: Kernel, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    """Differentiate straight through the rounding of x, whose own derivative is zero."""

    def exact(x: Array, w: QTensor | Prepared, after: Epilogue) -> Array:
        x, w = _rotate_inputs(x, w)
        return after.apply(float32_dot(x, to_qtensor(w)))

    _, tangent = jax.jvp(exact, primals, tangents)
    return _product(*primals, activations, name, kernel), tangent


def integer_dot_needs(w: QTensor) -> str:
    """Say what W lacks for integer products; return "" if they can be computed."""
    if not w.spec.coding.integral:
        return "evenly spaced levels"
    if not w.by_row and w.scale.size != 1:
        return "grids that each lie in one row of W"
    if w.length // (w.row_groups if w.by_row else 1) > MAX_PRODUCTS:
        return f"at most {MAX_PRODUCTS} products in a sum, for 32 bits to hold it"
    return ""
