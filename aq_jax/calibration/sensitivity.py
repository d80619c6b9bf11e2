"""What a model's outputs change by when one tensor alone is quantized.

A sentence's change is 1 - cosine between the float model's output and the changed one's; for a language model, a
token's, of the last hidden states. Small changes of different tensors are nearly at right angles to each other, so that
theirs add up: the sum is what a model with all of them is predicted to change by.

All texts run in one shape, so that every program is compiled once, and layers of one structure share them.
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

from aq_jax.calibration.layerwise import embedding_moments, parameter
from aq_jax.calibration.text import Batch
from aq_jax.calibration.walk import mask_of, staged, tapped
from aq_jax.config import QuantizationConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError
from aq_jax.nn.compiled import Program
from aq_jax.nn.models import Model
from aq_jax.nn.sentences import Sentences
from aq_jax.ops import dequantize
from aq_jax.quantizers.apply import quantize_tree
from aq_jax.quantizers.lookup import calibrated_by
from aq_jax.quantizers.screen import to_half


class Outputs:
    """What a float model makes of texts, and how far a changed model is from it.

    Args:
        model: in float.
        batches: of token ids.
        said: of sentences: what embeddings are; None for a language model.
        programs: another's, of the same kind of model, to share.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        said: Sentences | None,
        programs: tuple[Program, ...] = (),
    ) -> None:
        self._ids = [jnp.asarray(ids) for ids, _ in batches]
        self._lengths = [jnp.asarray(lengths) for _, lengths in batches]
        self.programs = programs or (
            Program(lambda model, ids: model.begin(ids)),
            Program(lambda layer, x, lengths: layer(x, mask_of(x, lengths))),
            Program(lambda model, x, lengths: _directions(model, x, lengths, said)),
            Program(lambda model, x, lengths, goal: _changes(model, x, lengths, goal, said)),
        )
        self.states: list[list[Array]] = [self._begin(model)]  # what each layer is given
        for layer in model.layers:
            self.states.append(self._advance(layer, self.states[-1]))
        end = self.programs[2].of(model)
        self._goals = [end(x, n) for x, n in zip(self.states.pop(), self._lengths, strict=True)]

    def change(self, model: Model, layer: int | None = None) -> float:
        """The mean of 1 - cosine between the float model's outputs and this one's.

        Args:
            model: of the same architecture.
            layer: the first that is not the float model's; None if what comes before the layers is not, either.
        """
        states = self._begin(model) if layer is None else self.states[layer]
        for each in list(model.layers)[layer or 0 :]:
            states = self._advance(each, states)
        compare = self.programs[3].of(model)
        sums = [compare(*each) for each in zip(states, self._lengths, self._goals, strict=True)]
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(0).tolist()
        return total / max(count, 1)

    def _begin(self, model: Model) -> list[Array]:
        run = self.programs[0].of(model)
        return [run(ids) for ids in self._ids]

    def _advance(self, layer: nnx.Module, states: list[Array]) -> list[Array]:
        run = self.programs[1].of(layer)
        return [run(x, n) for x, n in zip(states, self._lengths, strict=True)]


def _directions(model: Model, x: Array, lengths: Array, said: Sentences | None) -> Float[Array, "outputs width"]:
    """Outputs of length 1, one a sentence or a token."""
    if said is not None:
        return said.directions(model.end(x), mask_of(x, lengths))
    x = model.end(x).reshape(-1, x.shape[-1])
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _changes(model: Model, x: Array, lengths: Array, goal: Array, said: Sentences | None) -> Float[Array, "2"]:
    """The sum of 1 - cosine over outputs, and how many there are; |a - b|^2 / 2, which does not cancel."""
    counted = lengths > 0 if said is not None else mask_of(x, lengths).reshape(-1)
    change = jnp.sum((_directions(model, x, lengths, said) - goal) ** 2, axis=-1) / 2
    return jnp.stack([jnp.sum(jnp.where(counted, change, 0.0)), jnp.sum(counted).astype(jnp.float32)])


def input_moments(model: Model, batches: Sequence[Batch], seed: int) -> dict[str, Float[Array, "inputs inputs"]]:
    """E[x^T x] of what each linear of the layers is given, by its kernel's path; of embeddings, that of the gradient.

    Raises:
        AqError: if a linear is given numbers that are not finite, by path.
    """
    found = {f"{path}.embedding": moment for path, moment in embedding_moments(model, batches, seed).items()}

    def both(layer: Any, x: Array, lengths: Array) -> tuple[Array, dict[str, Array]]:
        mask, moments = mask_of(x, lengths), {}
        seen, after = tapped(layer, x, mask)
        for paths, given in staged(seen):
            flat = jnp.where(mask[..., None], given, 0.0).reshape(-1, given.shape[-1])
            moments |= dict.fromkeys(paths, jnp.matmul(flat.T, flat, precision="highest"))
        return after, moments

    begin, walk = Program(lambda model, ids: model.begin(ids)).of(model), Program(both)
    tokens = max(1, sum(int(lengths.sum()) for _, lengths in batches))
    states = [begin(jnp.asarray(ids)) for ids, _ in batches]
    for i, layer in enumerate(model.layers):
        run, sums = walk.of(layer), {}
        for n, (_, lengths) in enumerate(batches):
            states[n], moments = run(states[n], jnp.asarray(lengths))
            sums = {path: sums[path] + moment if sums else moment for path, moment in moments.items()}
        found |= {f"layers.{i}.{path}.kernel": moment / tokens for path, moment in sums.items()}
    for path, moment in found.items():
        if not bool(jnp.isfinite(jnp.trace(moment))):
            raise AqError(f"{path}: is given numbers that are not finite when the model runs on the text")
    return found


def sensitivities(
    model: Model,
    policies: Mapping[str, Sequence[QuantizationConfig]],
    outputs: Outputs,
    moments: Mapping[str, Array],
    damping: float,
    tokens: Int[np.ndarray, "tokens"],
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """What each policy of each tensor changes the outputs by, all other tensors being float.

    Args:
        model: in float; changed while this runs, and put back.
        policies: of each tensor, by path; of one tensor, nothing left to resolve.
        outputs: of the model.
        moments: of `input_moments`.
        damping: as in `CalibrationConfig`.
        tokens: that the texts of `outputs` have: other rows of tables with a row a token cannot change them.
        progress: called with each path.

    Raises:
        AqError: for an output that is not finite, by path.
    """
    found: dict[str, list[float]] = {}
    for path, choices in policies.items():
        slot = parameter(model, path)
        before, turned = slot[...], path.endswith(".kernel")
        layer = int(path.split(".")[1]) if path.startswith("layers.") else None
        weight = np.asarray(before.T if turned else before)
        rows = tokens if path == model.table else np.arange(weight.shape[0])
        found[path] = []
        for policy in choices:
            changed = rounded(weight[rows], policy, moments.get(path), damping, path)
            value = jnp.asarray(changed.T) if turned else before.at[jnp.asarray(rows)].set(jnp.asarray(changed))
            try:
                slot[...] = value
                found[path].append(outputs.change(model, layer))
            finally:
                slot[...] = before
            if not np.isfinite(found[path][-1]):
                raise AqError(f"{path}: outputs are not finite when it is {policy.quant_type}; keep it in more bits")
        if progress is not None:
            progress(path)
    return found


def rounded(
    weight: Float[np.ndarray, "rows inputs"],
    policy: QuantizationConfig,
    moment: Array | None,
    damping: float,
    name: str,
) -> Float[np.ndarray, "rows inputs"]:
    """A weight as it is once quantized; on its inputs, if the policy says so, below eight bits, where it matters."""
    if not policy.coded:
        return to_half(weight).astype(np.float32) if policy.quant_type == "fp16" else weight
    if (quantizer := calibrated_by(policy)) is not None:
        spec = policy.spec_for(weight.shape, name)
        if spec.bits < 8 and moment is not None:
            under = quantizer.metric(moment, damping, spec.rotation)
            q = quantizer.solve(weight, under, spec, policy.symmetric, quick=True)
            return np.asarray(dequantize(jax.device_put(q)))
        policy = replace(policy, solver=None)
    q = quantize_tree({name: weight}, policy)[name]
    return np.asarray(dequantize(q) if isinstance(q, QTensor) else q)
