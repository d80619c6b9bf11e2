"""Calibrate the weights of a whole model: the embeddings first, then layer after layer.

Each linear is solved on its inputs in the quantized model so far, because those are the inputs it will get. Before it
is rounded, it moves a part of the way to the weight that gives the float layer's outputs from those inputs (after
GPTAQ, Y. Li et al., arXiv:2504.02692): with q and f its inputs in the quantized and the float model, the damped least
squares of f W^T - q V^T is at V = W + W (E[f^T q] - E[q^T q]) (E[q^T q] + d)^-1.

An embedding table is solved under the second moment of the model's gradient at its output, which says how much a change
of a row in each direction changes the final hidden states.
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

from aq_jax.calibration.layer_inputs import HessianSums, LayerInputs, token_mask
from aq_jax.calibration.text import Batch, choose_common_length, pad_to_one_shape
from aq_jax.config import CalibrationConfig, QuantizationConfig
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError
from aq_jax.nn.compiled import Program
from aq_jax.nn.models import Model
from aq_jax.ops import dequantize
from aq_jax.progress import Progress
from aq_jax.quantizers.lookup import calibrated_quantizer

GRADIENT_BATCHES = 8  # a few thousand gradients: tables are a few hundred numbers wide


@dataclass
class CalibrationResult:
    """The result of calibrating a model.

    Args:
        weights: QTensors of NumPy leaves by path; linears as [outputs, inputs].
        errors: The relative squared error of each weight's output.
        fallbacks: The reason why a weight was not calibrated, by path.
        tokens: The number of tokens that the model ran on.
        compiles: The number of programs that were compiled for the model's layers.
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
    fallback_value: Callable[[str], Array],
    progress: Progress | None = None,
) -> CalibrationResult:
    """Solve the weights of a model, each on its own inputs.

    Args:
        model: The float model; it is not changed.
        quantized: A copy whose other weights are dequantized already; the solved ones are put into it.
        policies: The configs of the weights to solve, by path: "layers.0.query.kernel", "word.embedding".
        batches: Batches of token ids (`calibration.text.pad_batches`).
        config: The correction, damping and seed.
        fallback_value: A function that gives, by path, the value of a weight that cannot be solved.
        progress: A callback that gets a path, its bytes in float32, and the bytes of all.

    Raises:
        AqError: if a weight's inputs or gradients are not finite, by path.
    """
    done = CalibrationResult(tokens=int(sum(lengths.sum() for _, lengths in batches)))
    specs = {path: policy.spec_for(weight_shape(model, path), path) for path, policy in policies.items()}
    quantizers = {path: found for path, policy in policies.items() if (found := calibrated_quantizer(policy))}
    total = sum(4 * get_parameter(model, path).size for path in specs)

    def fall_back(path: str, reason: str) -> None:
        done.fallbacks[path] = reason
        set_weight(quantized, path, fallback_value(path))

    def put(path: str, weight: np.ndarray, hessian: Array, prepared: Any, target: np.ndarray) -> None:
        q = quantizers[path].solve(target, prepared, specs[path], policies[path].symmetric)
        value = dequantize(jax.device_put(q))
        bounded = ((q.scale > SCALE_MIN) & (q.scale < SCALE_MAX)).all()
        if not bounded or (weight.any(1) & ~np.asarray(value).any(1)).any():  # numbers so small are zeros to XLA
            fall_back(path, "its weights need scales that float32 cannot hold")
            return
        error = float(_relative_error(value, weight, hessian))
        if not error < 1:
            fall_back(path, f"its solved values are no better than zeros: their relative error is {error:.3g}")
            return
        done.weights[path] = q
        set_weight(quantized, path, value)
        done.errors[path] = error
        if progress is not None:
            progress(path, 4 * weight.size, total)

    embeddings = [path for path in specs if path.endswith(".embedding")]
    hessians = embedding_hessians(model, batches, config.seed) if embeddings else {}
    for path in embeddings:
        hessian = hessians.get(path.removesuffix(".embedding"))
        if hessian is None:
            continue
        if not (size := float(jnp.trace(hessian))):
            fall_back(path, "the model's output did not depend on it on this text")
            continue
        if not np.isfinite(size):
            raise AqError(f"{path}: its gradients are not finite when the model runs on the text; check the layers")
        weight = np.asarray(get_weight(model, path))
        prepared = quantizers[path].prepare_hessian(hessian, config.damping, specs[path].rotation)
        put(path, weight, hessian, prepared, weight)
    inputs = LayerInputs(model, quantized, batches)
    for layer in range(len(model.layers)):
        for index, members in enumerate(inputs.linears_by_input):
            paths = [path for path in (f"layers.{layer}.{name}.kernel" for name in members) if path in specs]
            if not paths:
                continue
            sums = inputs.hessian_sums(index)
            hessian = sums.own / sums.tokens
            if not (jnp.isfinite(sums.own).all() & jnp.isfinite(sums.cross).all()):
                raise AqError(
                    f"{paths[0]}: its inputs are not finite when the model runs on the text; check the layers before it"
                )
            if not jnp.trace(hessian):
                for path in paths:
                    fall_back(path, "its inputs were all zero on this text")
                continue
            move = _gptaq_correction(sums, config.damping) * config.correction
            kinds = {path: (quantizers[path], specs[path].rotation) for path in paths}
            prepared = {kind: kind[0].prepare_hessian(hessian, config.damping, kind[1]) for kind in kinds.values()}
            for path in paths:
                weight = np.asarray(get_weight(model, path))
                put(path, weight, hessian, prepared[kinds[path]], np.asarray(weight + weight @ move))
        inputs.advance()
    for path in specs.keys() - done.weights.keys() - done.fallbacks.keys():
        fall_back(path, "the model does not use it, or uses it outside its layers")
    done.compiles = inputs.compiles
    return done


@jax.jit
def _gptaq_correction(sums: HessianSums, damping: float) -> Float[Array, "inputs inputs"]:
    """Compute the matrix that W times gives the damped least-squares change of W towards the float outputs.

    As in `prepare_hessian`, damping grows tenfold until float32 has a solution.
    """
    unit = jnp.mean(jnp.diagonal(sums.own)) * jnp.eye(len(sums.own), dtype=jnp.float32)

    def solve(damping: Array) -> tuple[Array, Array]:
        factor = jax.scipy.linalg.cho_factor(sums.own + damping * unit)
        return damping, jax.scipy.linalg.cho_solve(factor, sums.cross - sums.own).T

    def failed(found: tuple[Array, Array]) -> Array:
        return ~jnp.isfinite(found[1]).all() & (found[0] < 1e6)

    first = solve(jnp.asarray(damping, jnp.float32))
    return jax.lax.while_loop(failed, lambda found: solve(10 * found[0]), first)[1]


@jax.jit
def _relative_error(value: Array, weight: Array, hessian: Array) -> Float[Array, ""]:
    """Compare outputs; none are as good as none."""
    change = value - weight
    found, most = jnp.vdot(change @ hessian, change), jnp.vdot(weight @ hessian, weight)
    return jnp.where(found == 0, 0.0, found / most)


def embedding_hessians(model: Model, batches: Sequence[Batch], seed: int) -> dict[str, Float[Array, "width width"]]:
    """Compute the second moment of the gradient at the output of each embedding table that `begin` reads.

    The gradient is that of the last hidden states times random numbers, so that its second moment is that of the
    Jacobian. A few batches are enough, of texts of all lengths in one shape.
    """
    texts = [row[:count] for ids, lengths in batches for row, count in zip(ids, lengths, strict=True) if count]
    length = choose_common_length([len(text) for text in texts], max(ids.shape[1] for ids, _ in batches))
    mixed = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    run, out = Program(_embedding_gradients).bind(model), {}
    for i, (ids, lengths) in enumerate(pad_to_one_shape(mixed, length)[:GRADIENT_BATCHES]):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for path, hessian in run(jnp.asarray(ids), jnp.asarray(lengths), key).items():
            out[path] = out[path] + hessian if path in out else hessian
    return out


def _embedding_gradients(model: Model, ids: Array, lengths: Array, key: Array) -> dict[str, Array]:
    """Compute the moments of one batch; a table that is read once for many tokens has one gradient for all of them."""

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
            x = layer(x, token_mask(x, lengths))
        return jnp.where(token_mask(x, lengths)[..., None], x, 0.0)

    out, pull = jax.vjp(hidden, {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()})
    (gradients,) = pull(jax.random.normal(key, out.shape, jnp.float32))
    flat = {path: g.reshape(-1, g.shape[-1]) for path, g in gradients.items()}
    return {path: jnp.matmul(g.T, g, precision="highest") for path, g in flat.items()}


def get_parameter(model: Model, path: str) -> nnx.Param:
    """Return the parameter at a path, such as layers.0.query.kernel."""
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def get_weight(model: Model, path: str) -> Array:
    """Return a weight as tables store it: kernels as [outputs, inputs]."""
    value = get_parameter(model, path)[...]
    return value.T if path.endswith(".kernel") else value


def weight_shape(model: Model, path: str) -> tuple[int, ...]:
    """Return the shape of a weight as tables store it."""
    shape = get_parameter(model, path).shape
    return shape[::-1] if path.endswith(".kernel") else shape


def set_weight(model: Model, path: str, value: Array) -> None:
    """Set a weight of a model, given as tables store it."""
    get_parameter(model, path)[...] = jnp.asarray(value.T if path.endswith(".kernel") else value)


def copy_vectors(model: Model) -> dict[str, Array]:
    """Copy norms and biases, by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): jnp.array(leaf[...]) for path, leaf in flat if leaf.ndim == 1}
