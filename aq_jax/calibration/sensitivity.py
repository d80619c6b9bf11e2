"""Measure how far a model's outputs move when one tensor alone is rounded.

The distance is 1 - cosine between the float model's output and the changed one's: of a sentence's embedding or, for a
language model, of a token's last hidden state. Small changes of different tensors are nearly orthogonal, so that their
distances add up: the sum predicts that of a model with all of them quantized.

The change is that of no code. GPTQ makes up for the error of a column in the columns that follow, so that rounding
noise n, of the same size in all columns, leaves n / diag(U) * U in the weights, where H^-1 = U^T U. Such noise is drawn
once, and the distance that it causes grows with its square: a code of twice its squared error costs twice as much. On
MiniLM this gives what solving each tensor in each width gave, at 2, 3 and 4 bits, within a tenth (one standard
deviation over tensors), and no tensor has to be solved.

All texts run in one shape, so that each program compiles once, and layers of one structure share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aq_jax.calibration.layer_inputs import group_by_input, record_inputs, token_mask
from aq_jax.calibration.layerwise import embedding_hessians, get_parameter
from aq_jax.calibration.text import Batch
from aq_jax.codes.rotation import unrotate_rows
from aq_jax.errors import AqError
from aq_jax.nn.compiled import Program
from aq_jax.nn.models import Model
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.quantizers.hessian import prepare_hessian

NOISE = 0.01
"""The squared noise beside the squared weights of a row: that of four to five bits."""


class Sensitivity(NamedTuple):
    """The effect of one tensor on a model's outputs.

    Args:
        distance: The distance that the noise of a calibrated code causes, if its square is NOISE.
        white: How many times as much is caused by a code that was chosen without the Hessian.
    """

    distance: float
    white: float


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

    Linears that share an input share the array.

    Raises:
        AqError: if a linear's inputs are not finite, by path.
    """
    found = {f"{path}.embedding": hessian for path, hessian in embedding_hessians(model, batches, seed).items()}

    def output_and_hessians(layer: Any, x: Array, lengths: Array) -> tuple[Array, dict[tuple[str, ...], Array]]:
        mask, hessians = token_mask(x, lengths), {}
        seen, after = record_inputs(layer, x, mask)
        for paths, given in group_by_input(seen):
            flat = jnp.where(mask[..., None], given, 0.0).reshape(-1, given.shape[-1])
            hessians[tuple(paths)] = jnp.matmul(flat.T, flat, precision="highest")
        return after, hessians

    begin, run_layer = Program(lambda model, ids: model.begin(ids)).bind(model), Program(output_and_hessians)
    tokens = max(1, sum(int(lengths.sum()) for _, lengths in batches))
    states = [begin(jnp.asarray(ids)) for ids, _ in batches]
    for i, layer in enumerate(model.layers):
        run, sums = run_layer.bind(layer), {}
        for n, (_, lengths) in enumerate(batches):
            states[n], hessians = run(states[n], jnp.asarray(lengths))
            sums = {paths: sums[paths] + hessian if sums else hessian for paths, hessian in hessians.items()}
        for paths, hessian in sums.items():
            mean = hessian / tokens
            found |= {f"layers.{i}.{path}.kernel": mean for path in paths}
    for path, hessian in found.items():
        if not bool(jnp.isfinite(jnp.trace(hessian))):
            raise AqError(
                f"{path}: its inputs are not finite when the model runs on the text; check the layers before it"
            )
    return found


def sensitivities(
    model: Model,
    rotations: Mapping[str, int],
    outputs: FloatOutputs,
    hessians: Mapping[str, Array],
    damping: float,
    tokens: Int[np.ndarray, "tokens"],
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Sensitivity]:
    """Measure how far rounding noise in each tensor moves the outputs while all other tensors stay as they are.

    Args:
        model: The float model; it is changed while this runs, and restored.
        rotations: The Hadamard block of each tensor, by path; 0 for none.
        outputs: The model's outputs.
        hessians: The result of `input_hessians`; noise in tensors that it does not have is white.
        damping: The damping of `CalibrationConfig`.
        tokens: The token ids in the texts of `outputs`: no other rows of an embedding table can change them.
        seed: The random seed of the noise.
        progress: A callback that gets each path.

    Raises:
        AqError: for an output that is not finite, by path.
    """
    found: dict[str, Sensitivity] = {}
    factors: dict[tuple[int, int], _Factor] = {}  # by the array's identity: linears of one input stand together
    for path, rotation in rotations.items():
        slot = get_parameter(model, path)
        before, is_kernel, hessian = slot[...], path.endswith(".kernel"), hessians.get(path)
        layer = int(path.split(".")[1]) if path.startswith("layers.") else None
        weight = np.asarray(before.T if is_kernel else before)
        rows = tokens if path == model.table else np.arange(weight.shape[0])
        if (key := (id(hessian), rotation)) not in factors:
            factors = {key: _Factor.of(hessian, damping, rotation)}
        changed = weight[rows] + factors[key].noise(weight[rows], np.random.default_rng([seed, len(found)]))
        value = jnp.asarray(changed.T) if is_kernel else before.at[jnp.asarray(rows)].set(jnp.asarray(changed))
        try:
            slot[...] = value
            found[path] = Sensitivity(outputs.distance(model, layer), factors[key].white)
        finally:
            slot[...] = before
        if not np.isfinite(found[path].distance):
            raise AqError(f"{path}: the outputs are not finite when it is rounded; keep it in float16, by an override")
        if progress is not None:
            progress(path)
    return found


class _Factor(NamedTuple):
    """The factor of a Hessian that shapes rounding noise; None for white noise."""

    u: Float[np.ndarray, "inputs inputs"] | None
    order: Int[np.ndarray, "inputs"] | None
    rotation: int
    white: float

    @classmethod
    def of(cls, hessian: Array | None, damping: float, rotation: int) -> _Factor:
        if hessian is None:
            return cls(None, None, rotation, 1.0)
        prepared = jax.device_get(prepare_hessian(hessian, damping, rotation))
        diagonal = np.diagonal(prepared.u)
        white = float(np.trace(prepared.h, dtype=np.float64) / np.sum(diagonal.astype(np.float64) ** -2))
        return cls(prepared.u / diagonal[:, None], prepared.order, rotation, white)

    def noise(
        self, weight: Float[np.ndarray, "rows inputs"], rng: np.random.Generator
    ) -> Float[np.ndarray, "rows inputs"]:
        size = np.sqrt(NOISE * np.mean(weight**2, axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        noise = rng.standard_normal(weight.shape, np.float32) * size
        if self.u is not None and self.order is not None:
            shaped = np.empty_like(noise)
            shaped[:, self.order] = noise @ self.u
            noise = shaped
        return unrotate_rows(noise, self.rotation) if self.rotation else noise
