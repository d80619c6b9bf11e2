"""The native kernels of codes: weights are quantized in one pass, and decoded, with XLA's bits.

Where a program is not for one CPU, and under `vmap`, XLA computes the same (see `native_calls`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jaxtyping import Array, Bool, DTypeLike, Float

from aq_jax.codes import Affine, Code, Trellis, bits_jax
from aq_jax.codes.runs import fills_bytes
from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor, check_layout, scale_shape
from aq_jax.native.host import Recipe
from aq_jax.ops import xla
from aq_jax.ops.native import missing
from aq_jax.ops.native_calls import make_primitive


class Quantize(xla.Quantize):
    """Grids and codes in one pass over the weights; codes on known grids are XLA's."""

    def refuses(self, size: int, code: Code) -> str:
        return missing() if type(code) is Affine else f"chooses evenly spaced codes only, found {code.name}"

    def solve(
        self, w: Float[Array, "*shape"], spec: QuantSpec, recipes: tuple[Recipe, ...], formulation: Callable[..., Any]
    ) -> tuple[QTensor, Bool[Array, ""], Bool[Array, ""]]:
        """Quantize weights by the best of some recipes, as `formulation` does."""
        return _solve(w, spec, recipes, formulation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _solve(w: Array, spec: QuantSpec, recipes: tuple[Recipe, ...], formulation: Callable[..., Any]) -> Any:
    return _call_quantize(w, spec, recipes, formulation)


@_solve.defjvp
def _solve_jvp(
    spec: QuantSpec, recipes: tuple[Recipe, ...], formulation: Callable[..., Any], primals: tuple, tangents: tuple
) -> tuple[Any, Any]:
    return jax.jvp(formulation, primals, tangents)


@dataclass(frozen=True)
class Dequantize:
    """(code - zero_point) * scale, and level * scale of trellis codes, with XLA's bits."""

    def refuses(self, w: QTensor) -> str:
        if not w.spec.coding.integral:
            return f"decodes trellis codes, and evenly spaced ones, only; found {w.spec.quant_type}"
        if w.codes.dtype not in (jnp.int8, jnp.uint8):
            return f"decodes codes of int8 or bytes only, found {w.codes.dtype}"
        return missing() if w.size else "wants elements"

    def run(self, w: QTensor, dtype: DTypeLike) -> Float[Array, "*shape"]:
        check_layout(w)
        return xla.saturated(_decode(w), dtype)


@jax.custom_jvp
def _decode(w: QTensor) -> Float[Array, "*shape"]:
    return _call_dequantize(w)


@_decode.defjvp
def _decode_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return jax.jvp(xla.decode_qtensor, primals, tangents)


def _call_quantize(
    w: Float[Array, "*shape"], spec: QuantSpec, recipes: tuple[Recipe, ...], formulation: Callable[..., Any]
) -> tuple[QTensor, Bool[Array, ""], Bool[Array, ""]]:
    """Choose grids and codes; tell whether all is well, and whether all is finite and in bounds.

    All is not well where a group looks like zeros, too.
    """
    codes, scale, zero, good, sound = _quantize.bind(w, like=(spec, recipes, formulation))
    return QTensor(codes, scale, zero, spec, w.shape[-1]), good, sound


def _quantize_by_library(w: Array, like: tuple[QuantSpec, tuple[Recipe, ...], Any]) -> list[Array]:
    spec, recipes, _ = like
    group, grids = min(spec.group_elements(w.shape), w.size), scale_shape(w.shape, spec)
    shape, dtype = spec.coding.codes_like(w.shape)
    whole = dtype == "uint8" and (fills_bytes(group, spec.bits) or group == w.size)
    codes = jax.ShapeDtypeStruct(shape if whole else w.shape, jnp.uint8 if whole else jnp.int8)
    numbers = jax.ShapeDtypeStruct(grids, jnp.float32)
    call = jax.ffi.ffi_call("aq_quantize", (codes, numbers, numbers, jax.ShapeDtypeStruct((1,), jnp.int32)))
    q, scale, zero, flags = call(
        w, group=np.int64(group), bits=np.int64(spec.bits), rounds=np.int64(recipes[0].rounds),
        methods=np.array([recipe.number for recipe in recipes]), starts=np.array(recipes[0].starts, np.float32),
    )  # fmt: skip
    q = bits_jax.pack(q, spec.bits) if dtype == "uint8" and not whole else q
    return [q, scale, zero, flags[0] == 0, flags[0] & 1 == 0]


def _quantize_by_xla(w: Array, like: tuple[QuantSpec, tuple[Recipe, ...], Any]) -> list[Array]:
    q, good, sound = like[2](w)
    return [q.codes, q.scale, q.zero_point, good, sound]


def _quantized(w: Any, like: tuple[QuantSpec, tuple[Recipe, ...], Any]) -> list[ShapedArray]:
    shape, dtype = like[0].coding.codes_like(w.shape)
    numbers = ShapedArray(scale_shape(w.shape, like[0]), np.dtype(np.float32))
    return [ShapedArray(shape, np.dtype(dtype)), numbers, numbers, *[ShapedArray((), np.dtype(np.bool_))] * 2]


def _call_dequantize(q: QTensor) -> Float[Array, "*shape"]:
    """Compute (code - zero_point) * scale + minimum."""
    code = q.spec.coding
    scale = q.scale.astype(code.grid_dtype)
    zero = jnp.zeros(0, code.zero_dtype) if q.zero_point is None else q.zero_point.astype(code.zero_dtype)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), q)
    return _dequantize.bind(q.codes, scale, zero, like=like)


def _dequantize_by_library(codes: Array, scale: Array, zero: Array, like: QTensor) -> Array:
    if isinstance(code := like.spec.coding, Trellis):
        call = jax.ffi.ffi_call("aq_dequantize_tiles", jax.ShapeDtypeStruct(like.shape, jnp.float32))
        return call(codes, scale, step_bits=np.int64(code.step_bits), step_rows=np.int64(code.step_rows))
    group = like.length // like.row_groups if like.by_row else min(like.spec.group_elements(like.shape), like.size)
    none = jnp.zeros(0, jnp.float32)
    grids = (none if grid is None else grid for grid in code.float_grids(scale, zero))
    call = jax.ffi.ffi_call("aq_dequantize", jax.ShapeDtypeStruct(like.shape, jnp.float32))
    return call(codes, *grids, bits=np.int64(like.spec.bits), group=np.int64(group))


def _dequantize_by_xla(codes: Array, scale: Array, zero: Array, like: QTensor) -> Array:
    return xla.decode_qtensor(
        dataclasses.replace(like, codes=codes, scale=scale, zero_point=None if like.zero_point is None else zero)
    )


def _batch_quantize(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[list[Array], list[int]]:
    return jax.vmap(lambda w: _quantize_by_xla(w, **params), dims)(*args), [0] * 5


def _batch_dequantize(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    return jax.vmap(lambda *one: _dequantize_by_xla(*one, **params), dims)(*args), 0


_quantize = make_primitive(
    "quantize", _quantize_by_library, _quantize_by_xla, lambda *_, **__: (), _batch_quantize, _quantized
)
_dequantize = make_primitive(
    "dequantize", _dequantize_by_library, _dequantize_by_xla, lambda *_, like: like.shape, _batch_dequantize
)
