"""Calls of the native library, as primitives: what each is lowered to is decided where a program is.

For one CPU it is the library's call. For other platforms, several devices, and programs that are exported, it is XLA's
formulation, of the same numerics: there no custom call could run. `vmap` over inputs makes them more rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Bool, Float, Int, Int8

from aq_jax.codes.rotation_jax import rotate
from aq_jax.core.dispatch import Activations
from aq_jax.core.prepared import unrotated
from aq_jax.core.qtensor import QTensor
from aq_jax.ops import xla, xla_attention
from aq_jax.ops.cached import Cached
from aq_jax.ops.epilogue import Epilogue
from aq_jax.ops.native_panels import Panels, code_attributes, from_panels
from aq_jax.ops.scores import Scores

ACTS = ("", "gelu", "gelu_new", "relu", "silu")
"""Activations in the order of the library's."""


def product(
    x: Float[Array, "rows inputs"], panels: Panels, activations: Activations, after: Epilogue, like: QTensor
) -> Float[Array, "rows outputs"]:
    """Rotate x as the weight is, round it if so asked, multiply it by the weight, and compute what follows."""
    none, outputs = jnp.zeros(0, jnp.float32), like.shape[0]
    bias, gain, shift = (none if part is None else part for part in (after.bias, after.gain, after.shift))
    no_rows = jnp.zeros((0, outputs), jnp.float32)
    factor, residual = (no_rows if part is None else part for part in (after.factor, after.residual))
    static = {"activations": activations, "act": after.act, "epsilon": float(after.epsilon), "like": like}
    return _product.bind(x, *_numbers(panels, like), bias, factor, residual, gain, shift, **static)


def rows(panels: Panels, ids: Int[Array, "count"], like: QTensor) -> Float[Array, "count width"]:
    """Look up rows of a table; NaN for a number that is none of its."""
    return _rows.bind(ids, *_numbers(panels, like), like=like)


def _numbers(panels: Panels, like: QTensor) -> Panels:
    """Give the numbers of a model that was cast their own dtypes again."""
    grids = panels.grids.astype(like.spec.coding.grid_dtype)
    return Panels(panels.codes, grids, panels.constants.astype(jnp.float32))


def quantize_rows(x: Float[Array, "rows inputs"], rotation: int = 0) -> tuple[Int8[Array, "rows inputs"], Array, Array]:
    """Rotate each row, if asked to, and round it to codes; return also the rows' scales and offsets.

    See `rotation_jax.rotate` and `xla.quantize_rows`.
    """
    numbers = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    call = jax.ffi.ffi_call("aq_quantize_rows", (jax.ShapeDtypeStruct(x.shape, jnp.int8), numbers, numbers))
    codes, scale, offset = call(x, block=np.int64(rotation))
    return codes, scale, offset


def attention(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch tokens width"],
    value: Float[Array, "batch tokens width"],
    mask: Bool[Array, "batch tokens"],
    heads: int,
    scores: Scores,
) -> Float[Array, "batch tokens width"]:
    """Compute softmax(q k / sqrt(d)) v in float32."""
    return _attention.bind(query, key, value, mask, heads=heads, scores=scores)


def cached_attention(
    query: Float[Array, "batch tokens heads size"],
    keys: Cached,
    values: Cached,
    positions: Int[Array, "tokens"],
    first: Int[Array, "batch"],
    scores: Scores,
) -> Float[Array, "batch tokens heads size"]:
    """Compute softmax(q k / sqrt(d)) v in float32; a token sees positions of its text up to its own."""
    at, begin = positions.astype(jnp.int32), first.astype(jnp.int32)
    return _cached_attention.bind(query, *keys, *values, begin, at, scores=scores)


def _product_by_library(
    x: Array, *rest: Array, activations: Activations, act: str, epsilon: float, like: QTensor
) -> Array:
    rotation, target = like.spec.rotation, "aq_product"
    inputs: tuple[Array, ...] = (x,)
    if activations == "int8":
        inputs, target = quantize_rows(x, rotation), "aq_product_of_codes"
    elif rotation:
        inputs = (jax.ffi.ffi_call("aq_rotate_rows", jax.typeof(x))(x, block=np.int64(rotation)),)
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], like.shape[0]), jnp.float32))
    static = {"act": np.int64(ACTS.index(act)), "eps": np.float32(epsilon)}
    return call(*inputs, *rest, weight=code_attributes(like), **static)


def _product_by_xla(x: Array, *rest: Array, activations: Activations, act: str, epsilon: float, like: QTensor) -> Array:
    *panels, bias, factor, residual, gain, shift = rest
    bias, gain, shift = (None if part.shape == (0,) else part for part in (bias, gain, shift))
    rows = (x.shape[0], like.shape[0])
    factor, residual = (part if part.shape == rows else None for part in (factor, residual))
    after = Epilogue(bias, factor, residual, gain, shift, act, epsilon)
    if like.spec.rotation:
        x = rotate(x, like.spec.rotation)
    return xla.Product().run(x, from_panels(Panels(*panels), unrotated(like)), activations, after)


def _rows_by_library(ids: Array, *panels: Array, like: QTensor) -> Array:
    call = jax.ffi.ffi_call("aq_rows", jax.ShapeDtypeStruct((ids.shape[0], like.length), jnp.float32))
    return call(ids, *panels, weight=code_attributes(like), outputs=np.int64(like.shape[0]))


def _rows_by_xla(ids: Array, *panels: Array, like: QTensor) -> Array:
    inside = (ids >= 0) & (ids < like.shape[0])
    wrapped = jnp.where(inside, ids, like.shape[0])
    return xla.Rows().run(from_panels(Panels(*panels), like), wrapped, inside)


def _attention_by_library(*qkv_and_mask: Array, heads: int, scores: Scores) -> Array:
    q = qkv_and_mask[0]
    call = jax.ffi.ffi_call("aq_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    return call(*qkv_and_mask, heads=np.int64(heads), **_static(scores, q.shape[-1] // heads))


def _attention_by_xla(query: Array, key: Array, value: Array, mask: Array, heads: int, scores: Scores) -> Array:
    return xla_attention.Attention().run(query, key, value, mask, heads, jnp.float32, scores)


def _cached_attention_by_library(*args: Array, scores: Scores) -> Array:
    q = args[0]
    call = jax.ffi.ffi_call("aq_cached_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    return call(*args, **_static(scores, q.shape[-1]))


def _cached_attention_by_xla(query: Array, *rest: Array, scores: Scores) -> Array:
    keys, values, (first, positions) = Cached(*rest[:2]), Cached(*rest[2:4]), rest[4:]
    return xla_attention.CachedAttention().run(query, keys, values, positions, jnp.float32, scores, first)


def _static(scores: Scores, size: int) -> dict[str, Any]:
    """Spell scores as the library's attributes; no reach is -1."""
    reach = np.int64(-1 if scores.reach is None else scores.reach)
    return {"scale": np.float32(scores.factor(size)), "cap": np.float32(scores.cap), "reach": reach}


def make_primitive(
    name: str, library: Callable[..., Any], formulation: Callable[..., Any], shape: Callable[..., tuple[int, ...]],
    batched: Callable[..., tuple[Any, Any]], several: Callable[..., list[ShapedArray]] | None = None,
) -> Primitive:  # fmt: skip
    """Make the primitive of a call, whose result is float32 of a `shape`, or `several` arrays."""
    primitive = Primitive(f"aq_jax_{name}")
    primitive.multiple_results = several is not None
    compiled = jax.jit(primitive.bind, static_argnames=("activations", "act", "epsilon", "like", "heads", "scores"))

    def run(*args: Array, **params: Any) -> Array:
        asked = (jax.debug_nans.value, jnp.isnan), (jax.debug_infs.value, jnp.isinf)
        wrong = [is_it for flag, is_it in asked if flag]
        # Or the call would come back here: JAX runs a program whose result is wrong once more, without `jit`.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            found = compiled(*args, **params)
            for leaf in jax.tree.leaves(found) if wrong else ():
                if jnp.issubdtype(leaf.dtype, jnp.floating) and any(is_it(leaf).any() for is_it in wrong):
                    raise FloatingPointError(f"invalid value (nan or inf) encountered in {primitive}")
        return found

    primitive.def_impl(run)

    def one(*args: Any, **params: Any) -> ShapedArray:
        return ShapedArray(shape(*args, **params), np.float32)

    primitive.def_abstract_eval(several or one)
    by_library, by_xla = (mlir.lower_fun(f, multiple_results=several is not None) for f in (library, formulation))

    def lower(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        where = ctx.module_context
        alone = getattr(where.axis_context, "num_devices", 0) == 1
        ours = tuple(where.platforms) == ("cpu",) and alone and not where.lowering_parameters.for_export
        return (by_library if ours else by_xla)(ctx, *args, **params)

    mlir.register_lowering(primitive, lower)
    batching.primitive_batchers[primitive] = batched
    return primitive


def _merge(args: Sequence[Array], dims: Sequence[int | None], which: Sequence[int]) -> tuple[list[Array], list[int]]:
    """Merge the mapped axis with the first of some arguments, repeating those without it; return both lengths."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    merged, lengths = list(args), [size, 0]
    for i in which:
        x, d = args[i], dims[i]
        whole = jnp.broadcast_to(x[None], (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        lengths[1] = whole.shape[1]
        merged[i] = whole.reshape(size * whole.shape[1], *whole.shape[2:])
    return merged, lengths


def _batch_rows(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    if any(d is not None for d in dims[1:]):  # several tables
        return jax.vmap(lambda *one: _rows_by_xla(*one, **params), dims)(*args), 0
    merged, lengths = _merge(args, dims, [0])
    found = _rows.bind(*merged, **params)
    return found.reshape(*lengths, *found.shape[1:]), 0


def _batch_product(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    by_row = [0, *(i for i in (5, 6) if args[i].shape[0] or dims[i] is not None)]  # factor and residual, if any
    if any(d is not None for i, d in enumerate(dims) if i not in by_row):  # several weights
        return jax.vmap(lambda *one: _product_by_xla(*one, **params), dims)(*args), 0
    merged, lengths = _merge(args, dims, by_row)
    y = _product.bind(*merged, **params)
    return y.reshape(*lengths, *y.shape[1:]), 0


def _batch_attention(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    merged, lengths = _merge(args, dims, range(4))
    y = _attention.bind(*merged, **params)
    return y.reshape(*lengths, *y.shape[1:]), 0


def _batch_cached_attention(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    if dims[-1] is not None:  # each has its own positions
        return jax.vmap(lambda *one: _cached_attention_by_xla(*one, **params), dims)(*args), 0
    merged, lengths = _merge(args, dims, range(len(args) - 1))
    y = _cached_attention.bind(*merged, **params)
    return y.reshape(*lengths, *y.shape[1:]), 0


_product = make_primitive(
    "product", _product_by_library, _product_by_xla, lambda x, *_, like, **__: (x.shape[0], like.shape[0]),
    _batch_product,
)  # fmt: skip
_rows = make_primitive(
    "rows", _rows_by_library, _rows_by_xla, lambda ids, *_, like: (ids.shape[0], like.length), _batch_rows
)
_attention = make_primitive(
    "attention", _attention_by_library, _attention_by_xla, lambda q, *_, **__: q.shape, _batch_attention
)
_cached_attention = make_primitive(
    "cached_attention", _cached_attention_by_library, _cached_attention_by_xla, lambda q, *_, **__: q.shape,
    _batch_cached_attention,
)  # fmt: skip
