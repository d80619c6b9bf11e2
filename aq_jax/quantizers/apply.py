"""Apply a config's quantizer to one array."""

from __future__ import annotations

from dataclasses import dataclass
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
from aq_jax.core.frameworks import to_jax
from aq_jax.core.qtensor import QTensor, assemble_qtensor, scale_shape, to_groups
from aq_jax.errors import AqError, ConfigError
from aq_jax.ops import dequantize
from aq_jax.ops.kernels import Kernel, choose_kernel
from aq_jax.quantizers.eligibility import Refused, refusal, to_float16
from aq_jax.quantizers.entry import recipes_of
from aq_jax.quantizers.lookup import check_policy, data_free_quantizer
from aq_jax.quantizers.statistics import Groups
from aq_jax.quantizers.tiles import quantize_array


def quantize(
    w: Any, config: QuantizationConfig | str, name: str = "weight", *, kernel: str | None = None
) -> QTensor | Array:
    """Quantize one array by a config, all of it at once: one compilation a shape.

    Under `jit`, `vmap` and the like nothing can be refused: ranges come from the finite elements, infinities
    saturate and NaN becomes a level near zero; fp16 saturates too. On a concrete array the config's `on_nonfinite`
    holds, and fp16 leaves an array alone that float16 cannot hold (see `QuantizationConfig`).

    Args:
        w: Floating weights of one axis or more, computed in float32: a JAX, NumPy or torch array, or nested lists.
        config: The config, or just a quant_type, such as "int8".
        name: The tensor's name, for error messages and for the config's patterns.
        kernel: The name of a kernel in `ops.KERNELS["quantize"]`; by default the first that takes the weights.

    Returns:
        A QTensor; or the array for fp16 and none, and for a tensor that is kept.

    Raises:
        AqError: for weights that are not floating, not finite, or out of the range of float32 scales, and for masked
            arrays.
        ConfigError: for an unknown quant_type or solver, for a solver that needs the running model, for an unknown
            kernel, and for one that does not take these weights.

    >>> import jax.numpy as jnp
    >>> from aq_jax import QuantizationConfig, quantize
    >>> quantize(jnp.ones((4, 256)), QuantizationConfig(quant_type="int4", group_size=64))
    QTensor(int4[4, 256], QuantSpec(bits=4, per_channel=False, group_size=64, rotation=0))
    """
    array = _floating_array(w, name)
    policy = policy_of(config).for_tensor(name, array.shape)
    if policy.quant_type in ("fp16", "none"):
        return _to_float16(array) if policy.quant_type == "fp16" else array
    quantizer = data_free_quantizer(policy, name)
    spec = policy.spec_for(array.shape, name)
    if spec.coding.matrices and not isinstance(array, Tracer):
        return quantize_on_host(np.asarray(array), policy, name, array)
    _, entry = choose_kernel("quantize", kernel, spec.group_elements(array.shape), spec.coding)
    q, good, sound = _quantize(array, spec, policy.symmetric, quantizer, entry)
    if isinstance(array, Tracer) or jax.device_get(good):
        return q
    # Groups that look like zeros may hold numbers too small for a float32 scale.
    why = refusal(np.asarray(array), spec, np.asarray(q.scale).reshape(-1), name, bool(sound))
    if why is None:
        return q
    if policy.on_nonfinite == "error":
        raise AqError(str(why))
    return array


def fake_quant(
    w: Shaped[ArrayLike, "*shape"], config: QuantizationConfig | str, name: str = "weight"
) -> Float[Array, "*shape"]:
    """Compute dequantize(quantize(w)) forwards and the identity backwards: the straight-through estimator.

    Args:
        w: Floating weights of one axis or more.
        config: The config, or just a quant_type. fp16 rounds to float16, none does nothing.
        name: The tensor's name, for error messages and for the config's patterns.

    Raises:
        AqError: for weights that are not floating, or have no axis. Values are never refused.

    Reference: Y. Bengio, N. Leonard, A. Courville, "Estimating or propagating gradients through stochastic neurons
    for conditional computation", arXiv:1308.3432.

    >>> import jax, jax.numpy as jnp
    >>> from aq_jax import fake_quant
    >>> jax.grad(lambda w: fake_quant(w, "int2").sum())(jnp.array([[0.3, -0.7]])).tolist()
    [[1.0, 1.0]]
    """
    w = _floating_array(w, name)
    policy = policy_of(config).for_tensor(name, w.shape)
    if policy.quant_type == "none":
        return w
    if policy.quant_type == "fp16":
        seen = _to_float16(w).astype(w.dtype)
    else:
        quantizer = data_free_quantizer(policy, name)
        spec = policy.spec_for(w.shape, name)
        _, entry = choose_kernel("quantize", None, spec.group_elements(w.shape), spec.coding)
        q, *_ = _quantize(lax.stop_gradient(w), spec, policy.symmetric, quantizer, entry)
        seen = dequantize(q, dtype=w.dtype)
    return _straight_through(w, lax.stop_gradient(seen))


@jax.custom_jvp
def _straight_through(w: Float[Array, "*shape"], seen: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `seen` exactly, even where w is not finite, with the derivative of w."""
    return seen


@_straight_through.defjvp
def _straight_through_jvp(values: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _straight_through(*values), tangents[0]  # so that its derivative is w's again


def quantize_on_host(host: np.ndarray, policy: QuantizationConfig, name: str, kept: Any) -> Any:
    """Quantize a NumPy array tile by tile; return `kept` for one that is refused and may stay as it is."""
    result = quantize_array(host, policy, name)
    if isinstance(result, Refused):
        return kept
    spec = policy.spec_for(host.shape, name)
    q = from_stream(result.data, result.scales, result.zero_points, host.shape, spec)
    devices = kept.devices() if isinstance(kept, Array) and kept.committed else set()
    return jax.device_put(q, *devices) if len(devices) == 1 else jax.device_put(q)


def _floating_array(w: Any, name: str) -> Array:
    """Convert weights to a JAX array; refuse what cannot be quantized."""
    array = to_jax(w, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise AqError(f"{name}: dtype {array.dtype} is not floating; wanted floating weights")
    if array.ndim == 0:
        raise AqError(f"{name}: a scalar has no axis to quantize along; wanted one axis or more")
    return array


def _to_float16(w: Array) -> Array:
    """Convert to float16; a traced array, whose values are not known, saturates."""
    if isinstance(w, Tracer):
        largest = float(jnp.finfo(jnp.float16).max)
        return jnp.clip(w.astype(jnp.float32), -largest, largest).astype(jnp.float16)
    return jnp.asarray(to_float16(np.asarray(w)))


def policy_of(config: QuantizationConfig | str) -> QuantizationConfig:
    """Return the config, or that of a quant_type, once its quantizer is known."""
    if not isinstance(config, QuantizationConfig | str):
        raise ConfigError(f"config = {str(config)[:80]}: wanted a QuantizationConfig, or a quant_type, such as 'int8'")
    policy = QuantizationConfig(quant_type=config) if isinstance(config, str) else config
    check_policy(policy)
    return policy


@partial(jax.jit, static_argnames=("spec", "symmetric", "quantizer", "kernel"))
def _quantize(
    w: Float[Array, "*shape"], spec: QuantSpec, symmetric: bool, quantizer: Any, kernel: Kernel
) -> tuple[QTensor, Bool[Array, ""], Bool[Array, ""]]:
    """Quantize; tell whether all is well, and whether elements are finite and scales in bounds.

    All is not well where a group looks like zeros, too.
    """
    if w.size == 0:
        ones = jnp.ones(scale_shape(w.shape, spec), jnp.float32)
        return (
            assemble_qtensor(ones[..., None][..., :0], ones, ones - 1, w.shape, spec),
            jnp.array(True),
            jnp.array(True),
        )
    wide = w.astype(jnp.float32)
    wide = rotate(wide, spec.rotation) if spec.rotation else wide
    if spec.coding.matrices:
        codes, scale, sound = quantizer.trace(wide, spec.coding)
        q = QTensor(codes, scale[..., None], None, spec, w.shape[-1], spec.coding.rows(w.shape))
        return q, sound, sound
    recipes = recipes_of(quantizer, spec.coding, symmetric, spec.group_elements(w.shape))
    formulation = _Formulation(spec, symmetric, quantizer, kernel)
    if recipes and (solve := getattr(kernel, "solve", None)):
        return solve(wide, spec, recipes, formulation)
    return formulation(wide)


@dataclass(frozen=True)
class _Formulation:
    """Quantize weights, which are rotated already, in XLA."""

    spec: QuantSpec
    symmetric: bool
    quantizer: Any
    kernel: Kernel

    def __call__(self, w: Float[Array, "*shape"]) -> tuple[QTensor, Bool[Array, ""], Bool[Array, ""]]:
        rows, pads = to_groups(w, self.spec)
        groups = Groups(rows, jnp.asarray(pads))
        grids = self.quantizer(groups, self.spec.coding, self.symmetric)
        codes, scale, zero_point, sound = _smallest_error(groups, grids, self.spec.coding, self.kernel)
        sound &= groups.finite
        zeros = jnp.min(jnp.maximum(groups.hi, -groups.lo), initial=1.0) == 0
        return assemble_qtensor(codes, scale, zero_point, w.shape, self.spec), sound & ~zeros, sound


def _smallest_error(groups: Groups, grids: tuple[Grid, ...], code: Code, kernel: Kernel) -> tuple[Array, ...]:
    """Choose the best candidate: its codes, scales and zero points, and whether it is sound."""

    def encoded(grid: Grid) -> tuple[Array, ...]:
        return kernel.run(groups.w, grid, code), grid.scale, grid.zero_point, jnp.all(grid.sound)

    if len(grids) == 1:
        return encoded(grids[0])
    # Relative to the tensor's largest value, so that no square is out of range.
    unit = 1 / jnp.maximum(jnp.max(jnp.maximum(groups.hi, -groups.lo)), 2.0**-126)
    errors = [
        jnp.sum(groups.scaled(jnp.full_like(grid.scale, unit)).squared_error(_times(grid, unit), code))
        for grid in grids
    ]
    best, least = encoded(grids[0]), errors[0]
    for grid, error in zip(grids[1:], errors[1:], strict=True):
        take = error < least
        best = tuple(jnp.where(take, new, old) for new, old in zip(encoded(grid), best, strict=True))
        least = jnp.where(take, error, least)
    return best


def _times(grid: Grid, factor: Array) -> Grid:
    return grid._replace(scale=grid.scale * factor, base=grid.base * factor)
