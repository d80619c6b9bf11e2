"""Measure how far a model's outputs move when one tensor alone is quantized.

The distance is 1 - cosine between the float model's output and the changed one's: of a sentence's embedding or, for a
language model, of a token's last hidden state. Small changes of different tensors are nearly orthogonal, so that their
distances add up: the sum predicts that of a model with all of them quantized.

All texts run in one shape, so that each program compiles once, and layers of one structure share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aq_jax.calibration.layer_inputs import group_by_input, record_inputs, token_mask
from aq_jax.calibration.layerwise import embedding_hessians, get_parameter
from aq_jax.calibration.text import Batch
from aq_jax.config import QuantizationConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError
from aq_jax.nn.compiled import Program
from aq_jax.nn.models import Model
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.ops import dequantize
from aq_jax.quantizers.apply import quantize_tree
from aq_jax.quantizers.eligibility import to_float16
from aq_jax.quantizers.lookup import calibrated_quantizer


class FloatOutputs:
    """The outputs of a float model on some texts, to measure a changed model's distance from them.

    Args:
        model: The float model.
        batches: Batches of token ids.
        sentences: How hidden states become embeddings; None for a language model.
        programs: The programs of another such object, of the same kind of model, to share.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        sentences: SentenceSettings | None,
        programs: tuple[Program, ...] = (),
    ) -> None:
        self._ids = [jnp.asarray(ids) for ids, _ in batches]
        self._lengths = [jnp.asarray(lengths) for _, lengths in batches]
        self.programs = programs or (
            Program(lambda model, ids: model.begin(ids)),
            Program(lambda layer, x, lengths: layer(x, token_mask(x, lengths))),
            Program(lambda model, x, lengths: _unit_outputs(model, x, lengths, sentences)),
            Program(lambda model, x, lengths, reference: _sum_distances(model, x, lengths, reference, sentences)),
        )
        self.states: list[list[Array]] = [self._begin(model)]  # each layer's inputs
        for layer in model.layers:
            self.states.append(self._advance(layer, self.states[-1]))
        end = self.programs[2].bind(model)
        self._references = [end(x, n) for x, n in zip(self.states.pop(), self._lengths, strict=True)]

    def distance(self, model: Model, layer: int | None = None) -> float:
        """Compute the mean of 1 - cosine between the float model's outputs and this model's.

        Args:
            model: A model of the same architecture.
            layer: The first layer that is changed; None if something before the layers is, too.
        """
        states = self._begin(model) if layer is None else self.states[layer]
        for each in list(model.layers)[layer or 0 :]:
            states = self._advance(each, states)
        compare = self.programs[3].bind(model)
        sums = [compare(*each) for each in zip(states, self._lengths, self._references, strict=True)]
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(0).tolist()
        return total / max(count, 1)

    def _begin(self, model: Model) -> list[Array]:
        run = self.programs[0].bind(model)
        return [run(ids) for ids in self._ids]

    def _advance(self, layer: nnx.Module, states: list[Array]) -> list[Array]:
        run = self.programs[1].bind(layer)
        return [run(x, n) for x, n in zip(states, self._lengths, strict=True)]


def _unit_outputs(
    model: Model, x: Array, lengths: Array, sentences: SentenceSettings | None
) -> Float[Array, "outputs width"]:
    """Compute outputs of length 1, one a sentence or a token."""
    if sentences is not None:
        return sentences.unit_embeddings(model.end(x), token_mask(x, lengths))
    x = model.end(x).reshape(-1, x.shape[-1])
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _sum_distances(
    model: Model, x: Array, lengths: Array, reference: Array, sentences: SentenceSettings | None
) -> Float[Array, "2"]:
    """Sum 1 - cosine over outputs, and count them; as |a - b|^2 / 2, which does not cancel."""
    counted = lengths > 0 if sentences is not None else token_mask(x, lengths).reshape(-1)
    change = jnp.sum((_unit_outputs(model, x, lengths, sentences) - reference) ** 2, axis=-1) / 2
    return jnp.stack([jnp.sum(jnp.where(counted, change, 0.0)), jnp.sum(counted).astype(jnp.float32)])


def input_hessians(model: Model, batches: Sequence[Batch], seed: int) -> dict[str, Float[Array, "inputs inputs"]]:
    """Compute E[x^T x] of the inputs of each linear, by its kernel's path; of embedding tables, that of the gradient.

    Raises:
        AqError: if a linear's inputs are not finite, by path.
    """
    found = {f"{path}.embedding": hessian for path, hessian in embedding_hessians(model, batches, seed).items()}

    def output_and_hessians(layer: Any, x: Array, lengths: Array) -> tuple[Array, dict[str, Array]]:
        mask, hessians = token_mask(x, lengths), {}
        seen, after = record_inputs(layer, x, mask)
        for paths, given in group_by_input(seen):
            flat = jnp.where(mask[..., None], given, 0.0).reshape(-1, given.shape[-1])
            hessians |= dict.fromkeys(paths, jnp.matmul(flat.T, flat, precision="highest"))
        return after, hessians

    begin, run_layer = Program(lambda model, ids: model.begin(ids)).bind(model), Program(output_and_hessians)
    tokens = max(1, sum(int(lengths.sum()) for _, lengths in batches))
    states = [begin(jnp.asarray(ids)) for ids, _ in batches]
    for i, layer in enumerate(model.layers):
        run, sums = run_layer.bind(layer), {}
        for n, (_, lengths) in enumerate(batches):
            states[n], hessians = run(states[n], jnp.asarray(lengths))
            sums = {path: sums[path] + hessian if sums else hessian for path, hessian in hessians.items()}
        found |= {f"layers.{i}.{path}.kernel": hessian / tokens for path, hessian in sums.items()}
    for path, hessian in found.items():
        if not bool(jnp.isfinite(jnp.trace(hessian))):
            raise AqError(
                f"{path}: its inputs are not finite when the model runs on the text; check the layers before it"
            )
    return found


def sensitivities(
    model: Model,
    policies: Mapping[str, Sequence[QuantizationConfig]],
    outputs: FloatOutputs,
    hessians: Mapping[str, Array],
    damping: float,
    tokens: Int[np.ndarray, "tokens"],
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Measure how far each policy of each tensor moves the outputs while all other tensors stay float.

    Args:
        model: The float model; it is changed while this runs, and restored.
        policies: The resolved configs to try for each tensor, by path.
        outputs: The model's outputs.
        hessians: The result of `input_hessians`.
        damping: The damping of `CalibrationConfig`.
        tokens: The token ids in the texts of `outputs`: no other rows of an embedding table can change them.
        progress: A callback that gets each path.

    Raises:
        AqError: for an output that is not finite, by path.
    """
    found: dict[str, list[float]] = {}
    for path, choices in policies.items():
        slot = get_parameter(model, path)
        before, is_kernel = slot[...], path.endswith(".kernel")
        layer = int(path.split(".")[1]) if path.startswith("layers.") else None
        weight = np.asarray(before.T if is_kernel else before)
        rows = tokens if path == model.table else np.arange(weight.shape[0])
        found[path] = []
        for policy in choices:
            changed = fake_quantized(weight[rows], policy, hessians.get(path), damping, path)
            value = jnp.asarray(changed.T) if is_kernel else before.at[jnp.asarray(rows)].set(jnp.asarray(changed))
            try:
                slot[...] = value
                found[path].append(outputs.distance(model, layer))
            finally:
                slot[...] = before
            if not np.isfinite(found[path][-1]):
                raise AqError(
                    f"{path}: the outputs are not finite when it is {policy.quant_type}; keep it in more bits"
                )
        if progress is not None:
            progress(path)
    return found


def fake_quantized(
    weight: Float[np.ndarray, "rows inputs"],
    policy: QuantizationConfig,
    hessian: Array | None,
    damping: float,
    name: str,
) -> Float[np.ndarray, "rows inputs"]:
    """Quantize and dequantize a weight; under its Hessian where the policy is calibrated and below eight bits."""
    if not policy.coded:
        return to_float16(weight).astype(np.float32) if policy.quant_type == "fp16" else weight
    if (quantizer := calibrated_quantizer(policy)) is not None:
        spec = policy.spec_for(weight.shape, name)
        if spec.bits < 8 and hessian is not None:
            prepared = quantizer.prepare_hessian(hessian, damping, spec.rotation)
            q = quantizer.solve(weight, prepared, spec, policy.symmetric, quick=True)
            return np.asarray(dequantize(jax.device_put(q)))
        policy = replace(policy, solver=None)
    q = quantize_tree({name: weight}, policy)[name]
    return np.asarray(dequantize(q) if isinstance(q, QTensor) else q)
