"""Weights to QTensors: a config's quantizer, applied to one array or to a tree of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from aq_jax.codes import Code, Grid
from aq_jax.codes.rotation_jax import rotate
from aq_jax.config import QuantizationConfig, QuantSpec
from aq_jax.core.bitstream import from_stream
from aq_jax.core.frameworks import is_variable, native, refuse_mask, to_jax, to_numpy
from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor, scale_shape, to_groups
from aq_jax.core.quantize import assemble
from aq_jax.core.torch_tensors import is_torch
from aq_jax.errors import AqError
from aq_jax.ops import dequantize
from aq_jax.ops.kernels import Kernel, choose
from aq_jax.quantizers.lookup import check_policy, without_inputs
from aq_jax.quantizers.measure import Groups
from aq_jax.quantizers.screen import Refused, refusal, to_half
from aq_jax.quantizers.tiles import quantize_array
from aq_jax.quantizers.treatment import treat, vectors_note
from aq_jax.store import DTYPES


def quantize(
    w: Any, config: QuantizationConfig | str, name: str = "weight", *, kernel: str | None = None
) -> QTensor | Array:
    """Quantize one array by a config, all of it at once: one compilation a shape.

    Under `jit`, `vmap` and the like nothing can be refused: ranges come from the finite elements, infinities
    saturate and NaN becomes a level near zero; fp16 saturates too. On a concrete array the config's `on_nonfinite`
    holds, and fp16 leaves an array alone that float16 cannot hold (see `QuantizationConfig`).

    Args:
        w: floating weights of one axis or more, computed in float32: a JAX, NumPy or torch array, or nested lists.
        config: or just a quant_type, such as "int8".
        name: for error messages, and for what the config says of names.
        kernel: who rounds to grids, of `ops.KERNELS["quantize"]`; by default the first that takes it.

    Returns:
        A QTensor; for fp16 and none, or if a tensor is to be kept, the array.

    Raises:
        AqError: for weights that are not floating, not finite, or out of the range of float32 scales, and for masked
            arrays.
        ConfigError: for an unknown quant_type or solver, for a solver that needs the running model, and for a kernel
            that is not there, or does not take this.

    >>> import jax.numpy as jnp
    >>> from aq_jax import QuantizationConfig, quantize
    >>> quantize(jnp.ones((4, 256)), QuantizationConfig(quant_type="int4", group_size=64))
    QTensor(int4[4, 256], QuantSpec(bits=4, per_channel=False, group_size=64, rotation=0))
    """
    policy = _policy(config).for_tensor(name)
    array = _floating(w, name)
    if policy.quant_type in ("fp16", "none"):
        return _half(array) if policy.quant_type == "fp16" else array
    quantizer = without_inputs(policy, name)
    spec = policy.spec_for(array.shape, name)
    _, entry = choose("quantize", kernel, spec.group_elements(array.shape), spec.coding)
    q, sound, zeros = _quantize(array, spec, policy.symmetric, quantizer, entry)
    if isinstance(array, Tracer):
        return q
    sound, zeros = jax.device_get((sound, zeros))
    if sound and not zeros:
        return q
    # Groups that were taken for zeros may hold numbers too small for a float32 scale.
    why = refusal(np.asarray(array), spec, np.asarray(q.scale).reshape(-1), name, bool(sound))
    if why is None:
        return q
    if policy.on_nonfinite == "error":
        raise AqError(str(why))
    return array


def fake_quant(
    w: Shaped[ArrayLike, "*shape"], config: QuantizationConfig | str, name: str = "weight"
) -> Float[Array, "*shape"]:
    """dequantize(quantize(w)) forwards, the identity backwards: the straight-through estimator.

    Args:
        w: floating weights of one axis or more.
        config: or just a quant_type. fp16 rounds to float16, none does nothing.
        name: for error messages, and for what the config says of names.

    Raises:
        AqError: for weights that are not floating, or have no axis. Values are never refused.

    Reference: Y. Bengio, N. Leonard, A. Courville, "Estimating or propagating gradients through stochastic neurons
    for conditional computation", arXiv:1308.3432.

    >>> import jax, jax.numpy as jnp
    >>> from aq_jax import fake_quant
    >>> jax.grad(lambda w: fake_quant(w, "int2").sum())(jnp.array([[0.3, -0.7]])).tolist()
    [[1.0, 1.0]]
    """
    policy, w = _policy(config).for_tensor(name), _floating(w, name)
    if policy.quant_type == "none":
        return w
    if policy.quant_type == "fp16":
        seen = _half(w).astype(w.dtype)
    else:
        quantizer = without_inputs(policy, name)
        spec = policy.spec_for(w.shape, name)
        _, entry = choose("quantize", None, spec.group_elements(w.shape), spec.coding)
        q, *_ = _quantize(lax.stop_gradient(w), spec, policy.symmetric, quantizer, entry)
        seen = dequantize(q, dtype=w.dtype)
    return _straight_through(w, lax.stop_gradient(seen))


@jax.custom_jvp
def _straight_through(w: Float[Array, "*shape"], seen: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`seen` exactly, even where w is not finite; its derivative is that of w."""
    return seen


@_straight_through.defjvp
def _straight_through_jvp(values: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return values[1], tangents[0]


def quantize_tree(params: Any, config: QuantizationConfig | str) -> Any:
    """Quantize the floating leaves of two axes or more of a pytree; the others, and QTensors, pass through.

    A leaf's name, which the config's patterns see, is its path joined by dots: {"a": {"b": w}} has "a.b". A variable of
    Flax NNX has its own path, and nothing of it adds to the name: a kernel of `nnx.state(model)` ends in ".kernel".
    Stacked norms and biases, of two axes, are left as they are, with a warning that names them, unless an override says
    otherwise (see `treat`).
    Concrete leaves stream through tiles of one shape, so that a tree of many shapes compiles no more often than a
    small one; traced and abstract leaves are quantized where they are.

    Args:
        params: a tree of JAX, NumPy or torch arrays. QTensors, integers and what is no array pass through.
        config: or just a quant_type.

    Raises:
        AqError: as `quantize`, naming the leaf.

    >>> import jax.numpy as jnp
    >>> from aq_jax import quantize_tree
    >>> tree = quantize_tree({"dense": {"kernel": jnp.ones((2, 8)), "bias": jnp.ones(2)}}, "int8")
    >>> tree["dense"]["kernel"].shape, tree["dense"]["kernel"].spec.bits, tree["dense"]["bias"].dtype
    ((2, 8), 8, dtype('float32'))
    """
    policy, vectors = _policy(config), list[str]()
    kept = (QTensor, Prepared)
    made = map_named(lambda name, leaf: _leaf(name, leaf, policy, vectors), params, lambda x: isinstance(x, kept))
    if vectors:
        warnings.warn(f"quantize_tree: {vectors_note(vectors)}", stacklevel=2)
    return made


def map_named(call: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """A tree of what `call` makes of each leaf and its name: the parts of its path joined by dots.

    A variable of Flax NNX is on the way to what it holds, but not in the name.

    >>> map_named(lambda name, leaf: name, {"a": [1, {"b": 2}]}, lambda x: False)
    {'a': ['a.0', {'b': 'a.1.b'}]}
    """

    def visit(path: tuple[Any, ...], node: Any) -> Any:
        if not is_variable(node):
            return call(path_name(path), node)
        return jax.tree_util.tree_map_with_path(
            lambda inner, leaf: call(path_name((*path, *inner[1:])), leaf), node, is_leaf=is_leaf
        )

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=lambda x: is_variable(x) or is_leaf(x))


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as the name of a tensor: its parts joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _leaf(name: str, leaf: Any, config: QuantizationConfig, vectors: list[str]) -> Any:
    """What becomes of one leaf; the name of one that is left alone for its name goes into `vectors`."""
    dtype = getattr(leaf, "dtype", None)
    if isinstance(leaf, QTensor | Prepared) or dtype is None:
        return leaf
    shape = tuple(leaf.shape)
    dtype = DTYPES.get(str(dtype).removeprefix("torch."), np.dtype(np.void)) if is_torch(leaf) else dtype
    treatment = treat(config, name, shape, dtype)
    policy, spec = treatment.policy, treatment.spec
    vectors += [name] if treatment.vector else []
    if spec is None and not (treatment.half and shape):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):  # a tree of shapes, to restore a checkpoint into
        return jax.eval_shape(lambda w: quantize(w, policy, name), leaf)
    if spec is None or isinstance(leaf, Tracer):
        return quantize(leaf, policy, name)
    refuse_mask(leaf, name)
    host = to_numpy(leaf, name) if is_torch(leaf) else native(np.asarray(leaf))
    result = quantize_array(host, policy, name)
    if isinstance(result, Refused):
        return leaf
    return jax.device_put(from_stream(result.data, result.scales, result.zero_points, host.shape, spec))


def _floating(w: Any, name: str) -> Array:
    """The weights as a JAX array, if they are what can be quantized."""
    array = to_jax(w, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise AqError(f"{name}: dtype {array.dtype} is not floating; only floating weights are quantized")
    if array.ndim == 0:
        raise AqError(f"{name}: a scalar has no axis to quantize along; wanted one axis or more")
    return array


def _half(w: Array) -> Array:
    """In float16; what is traced cannot be looked at, and saturates."""
    if isinstance(w, Tracer):
        largest = float(jnp.finfo(jnp.float16).max)
        return jnp.clip(w.astype(jnp.float32), -largest, largest).astype(jnp.float16)
    return jnp.asarray(to_half(np.asarray(w)))


def _policy(config: QuantizationConfig | str) -> QuantizationConfig:
    policy = QuantizationConfig(quant_type=config) if isinstance(config, str) else config
    check_policy(policy)
    return policy


@partial(jax.jit, static_argnames=("spec", "symmetric", "quantizer", "kernel"))
def _quantize(
    w: Float[Array, "*shape"], spec: QuantSpec, symmetric: bool, quantizer: Any, kernel: Kernel
) -> tuple[QTensor, Bool[Array, ""], Bool[Array, ""]]:
    """The QTensor; whether all elements were finite and all scales within bounds; whether a group looked like zeros."""
    if w.size == 0:
        ones = jnp.ones(scale_shape(w.shape, spec), jnp.float32)
        return assemble(ones[..., None][..., :0], ones, ones - 1, w.shape, spec), jnp.array(True), jnp.array(False)
    wide = w.astype(jnp.float32)
    rows, pads = to_groups(rotate(wide, spec.rotation) if spec.rotation else wide, spec)
    groups = Groups(rows, jnp.asarray(pads))
    grids = quantizer(groups, spec.coding, symmetric)
    codes, scale, zero_point, sound = _smallest_error(groups, grids, spec.coding, kernel)
    zeros = jnp.min(jnp.maximum(groups.hi, -groups.lo), initial=1.0) == 0
    return assemble(codes, scale, zero_point, w.shape, spec), sound & groups.finite, zeros


def _smallest_error(groups: Groups, grids: tuple[Grid, ...], code: Code, kernel: Kernel) -> tuple[Array, ...]:
    """Codes, scales and zero points of the best candidate, and whether it is sound."""

    def placed(grid: Grid) -> tuple[Array, ...]:
        return kernel.run(groups.w, grid, code), grid.scale, grid.zero_point, jnp.all(grid.sound)

    if len(grids) == 1:
        return placed(grids[0])
    # Relative to the tensor's largest value, so that no square is out of range.
    unit = 1 / jnp.maximum(jnp.max(jnp.maximum(groups.hi, -groups.lo)), 2.0**-126)
    errors = [jnp.sum(groups.scaled(jnp.full_like(grid.scale, unit)).error(_times(grid, unit), code)) for grid in grids]
    best, least = placed(grids[0]), errors[0]
    for grid, error in zip(grids[1:], errors[1:], strict=True):
        take = error < least
        best = tuple(jnp.where(take, new, old) for new, old in zip(placed(grid), best, strict=True))
        least = jnp.where(take, error, least)
    return best


def _times(grid: Grid, factor: Array) -> Grid:
    return grid._replace(scale=grid.scale * factor, base=grid.base * factor)
