"""Calibrated weights of a whole model: the embeddings first, then layer after layer.

Each linear is solved on what it is given in the quantized model so far, because that is what it will be given; and
before it is rounded, it is moved a part of the way to the weight that gives the float layer's outputs from those inputs
(after GPTAQ, Y. Li et al., arXiv:2504.02692): with q and f what it is given in the quantized and the float model, the
least squares of f W^T - q V^T, damped, is at V = W + W (E[f^T q] - E[q^T q]) (E[q^T q] + d)^-1.

An embedding table is solved under the second moment of the model's gradient at its output, which says how much a change
of a row in one direction or another changes the hidden states in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from aq_jax.calibration.text import Batch, common_length, one_shape
from aq_jax.calibration.walk import Moments, Walk, mask_of
from aq_jax.config import CalibrationConfig, QuantizationConfig
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError
from aq_jax.nn.compiled import Program
from aq_jax.nn.models import Model
from aq_jax.ops import dequantize
from aq_jax.progress import Progress
from aq_jax.quantizers.lookup import calibrated_by

GRADIENT_BATCHES = 8  # a few thousand gradients: tables are some hundred numbers wide


@dataclass
class Calibrated:
    """What calibration made of a model.

    Args:
        weights: QTensors of NumPy leaves by path; linears as [outputs, inputs].
        errors: of each: the mean square of what its output changed by, of its mean square.
        fallbacks: why a weight was not calibrated, by path.
        tokens: that the model was run on.
        compiles: programs of the model's layers that were compiled.
    """

    weights: dict[str, QTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    compiles: int = 0


def calibrate(
    model: Model,
    quantized: Model,
    policies: Mapping[str, QuantizationConfig],
    batches: Sequence[Batch],
    config: CalibrationConfig,
    unsolved: Callable[[str], Array],
    progress: Progress | None = None,
) -> Calibrated:
    """Solve the weights of a model, each under what it is given.

    Args:
        model: in float; it is not changed.
        quantized: a copy whose other weights are already what quantized ones stand for; those that are solved
            here are put into it.
        policies: of the weights to solve, by path: "layers.0.query.kernel", "word.embedding".
        batches: of token ids (`calibration.text.padded_batches`).
        config: correction, damping and seed.
        unsolved: what a weight that cannot be solved will be instead, by path.
        progress: called with a path, its bytes in float32, and the bytes of all.

    Raises:
        AqError: if a weight is given numbers that are not finite, by path.
    """
    done = Calibrated(tokens=int(sum(lengths.sum() for _, lengths in batches)))
    specs = {path: policy.spec_for(shape_of(model, path), path) for path, policy in policies.items()}
    quantizers = {path: found for path, policy in policies.items() if (found := calibrated_by(policy))}
    total = sum(4 * parameter(model, path).size for path in specs)

    def fall_back(path: str, why: str) -> None:
        done.fallbacks[path] = why
        put_weight(quantized, path, unsolved(path))

    def put(path: str, weight: np.ndarray, under: Any, target: np.ndarray) -> None:
        q = quantizers[path].solve(target, under, specs[path], policies[path].symmetric)
        value = dequantize(jax.device_put(q))
        bounded = ((q.scale > SCALE_MIN) & (q.scale < SCALE_MAX)).all()
        if not bounded or (weight.any(1) & ~np.asarray(value).any(1)).any():  # numbers so small are zeros to XLA
            fall_back(path, "its weights want scales that float32 does not hold")
            return
        done.weights[path] = q
        put_weight(quantized, path, value)
        done.errors[path] = float(_relative(value, weight, moment))
        if progress is not None:
            progress(path, 4 * weight.size, total)

    embeddings = [path for path in specs if path.endswith(".embedding")]
    moments = embedding_moments(model, batches, config.seed) if embeddings else {}
    for path in embeddings:
        moment = moments.get(path.removesuffix(".embedding"))
        if moment is not None:
            weight = np.asarray(weight_of(model, path))
            put(path, weight, quantizers[path].metric(moment, config.damping, specs[path].rotation), weight)
    walk = Walk(model, quantized, batches)
    for layer in range(len(model.layers)):
        for stage, members in enumerate(walk.stages):
            paths = [path for path in (f"layers.{layer}.{name}.kernel" for name in members) if path in specs]
            if not paths:
                continue
            sums = walk.moments(stage)
            moment = sums.own / sums.tokens
            size = float(jnp.trace(moment))
            if not np.isfinite(size):
                raise AqError(f"{paths[0]}: is given numbers that are not finite when the model runs on the text")
            if size == 0:
                for path in paths:
                    fall_back(path, "it was given nothing but zeros on this text")
                continue
            move = _correction(sums, config.damping) * config.correction
            kinds = {path: (quantizers[path], specs[path].rotation) for path in paths}
            metrics = {kind: kind[0].metric(moment, config.damping, kind[1]) for kind in kinds.values()}
            for path in paths:
                weight = np.asarray(weight_of(model, path))
                put(path, weight, metrics[kinds[path]], np.asarray(weight + weight @ move))
        walk.advance()
    for path in specs.keys() - done.weights.keys() - done.fallbacks.keys():
        fall_back(path, "the model does not use it, or uses it outside its layers")
    done.compiles = walk.compiles
    return done


@jax.jit
def _correction(sums: Moments, damping: float) -> Float[Array, "inputs inputs"]:
    """By what W is multiplied to have the change of W that gives the float outputs best, damped."""
    own = sums.own + damping * jnp.mean(jnp.diagonal(sums.own)) * jnp.eye(len(sums.own), dtype=jnp.float32)
    factor = jax.scipy.linalg.cho_factor(own)
    return jax.scipy.linalg.cho_solve(factor, sums.cross - sums.own).T


@jax.jit
def _relative(value: Array, weight: Array, moment: Array) -> Float[Array, ""]:
    change = value - weight
    return jnp.vdot(change @ moment, change) / jnp.vdot(weight @ moment, weight)


def embedding_moments(model: Model, batches: Sequence[Batch], seed: int) -> dict[str, Float[Array, "width width"]]:
    """Of each embedding table that `begin` looks up in: the second moment of the gradient at its output.

    The gradient is that of the last hidden states times random numbers, so that its second moment is that of the
    Jacobian. A few batches are enough, of texts of all lengths in one shape.
    """
    texts = [row[:count] for ids, lengths in batches for row, count in zip(ids, lengths, strict=True) if count]
    length = common_length([len(text) for text in texts], max(ids.shape[1] for ids, _ in batches))
    mixed = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    run, out = Program(_embedding_gradients).of(model), {}
    for i, (ids, lengths) in enumerate(one_shape(mixed, length)[:GRADIENT_BATCHES]):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for path, moment in run(jnp.asarray(ids), jnp.asarray(lengths), key).items():
            out[path] = out[path] + moment if path in out else moment
    return out


def _embedding_gradients(model: Model, ids: Array, lengths: Array, key: Array) -> dict[str, Array]:
    """Of one batch; a table that is looked up in once for many tokens has one gradient for all of them."""

    class Shifted(nnx.Module):
        def __init__(self, path: str, embed: nnx.Embed) -> None:
            self.path, self.embed = path, embed

        def __call__(self, ids: Array) -> Array:
            found = self.embed(ids)
            shapes[self.path] = found.shape
            return found + shifts.get(self.path, 0.0)

    def wrap(path: Any, node: Any) -> Any:
        return Shifted(".".join(map(str, path)), node) if type(node) is nnx.Embed else node

    shifts: dict[str, Array] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    jax.eval_shape(lambda: nnx.recursive_map(wrap, model).begin(ids))

    def hidden(given: dict[str, Array]) -> Array:
        shifts.update(given)
        x = nnx.recursive_map(wrap, model).begin(ids)
        for layer in model.layers:
            x = layer(x, mask_of(x, lengths))
        return jnp.where(mask_of(x, lengths)[..., None], x, 0.0)

    out, pull = jax.vjp(hidden, {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()})
    (gradients,) = pull(jax.random.normal(key, out.shape, jnp.float32))
    flat = {path: g.reshape(-1, g.shape[-1]) for path, g in gradients.items()}
    return {path: jnp.matmul(g.T, g, precision="highest") for path, g in flat.items()}


def parameter(model: Model, path: str) -> nnx.Param:
    """The parameter at a path, such as layers.0.query.kernel."""
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def weight_of(model: Model, path: str) -> Array:
    """A weight as tables have it: kernels as [outputs, inputs]."""
    value = parameter(model, path)[...]
    return value.T if path.endswith(".kernel") else value


def shape_of(model: Model, path: str) -> tuple[int, ...]:
    """The shape of a weight, as tables have it."""
    shape = parameter(model, path).shape
    return shape[::-1] if path.endswith(".kernel") else shape


def put_weight(model: Model, path: str, value: Array) -> None:
    """Put a weight, as tables have it, into a model."""
    parameter(model, path)[...] = jnp.asarray(value.T if path.endswith(".kernel") else value)


def vectors(model: Model) -> dict[str, Array]:
    """Copies of norms and biases, by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): jnp.array(leaf[...]) for path, leaf in flat if leaf.ndim == 1}
