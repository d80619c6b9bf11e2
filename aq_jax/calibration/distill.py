"""Distill a float encoder into a quantized one: one training step towards its hidden states and embeddings.

The loss of a batch is the sum of
  - 1 - cosine between the two models' sentence embeddings, averaged over sentences;
  - the mean squared difference of hidden states, relative to the float ones' mean square, averaged over layers;
  - the squared difference of the cosines between any two sentences of the batch.
It needs no labels (TinyBERT, X. Jiao et al., arXiv:1909.10351; relations: W. Park et al., arXiv:1904.05068).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from aq_jax.calibration.latent import Latent, clip_latent, init_latent, latent_to_float, stored_scale
from aq_jax.calibration.layer_inputs import token_mask
from aq_jax.calibration.layerwise import get_parameter, get_weight, set_weight
from aq_jax.calibration.row_scales import unit_values
from aq_jax.calibration.text import Batch
from aq_jax.core.dispatch import COMPILER_OPTIONS, backend
from aq_jax.core.qtensor import QTensor
from aq_jax.nn.compiled import split_module
from aq_jax.nn.models import Model
from aq_jax.nn.sentences import SentenceSettings

ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)
# Learning rates, relative to the run's. The embedding table's is higher: few steps see any one of its rows.
CODES_RATE, TABLE_CODES_RATE, SCALES_RATE, ZERO_POINTS_RATE, VECTORS_RATE = 1.0, 2.0, 0.6, 1.0, 0.2
TABLE_SCALES_RATE = 1.2  # where codes stay, and scales are all that moves


class TrainedWeights(NamedTuple):
    """The weights that are trained, by path.

    Args:
        latents: The latent weights of matrices of evenly spaced levels, as [outputs, inputs].
        log_scales: The logarithms of the scales of other matrices, whose codes stay (`row_scales`).
        vectors: Norms and biases.
    """

    latents: dict[str, Latent]
    log_scales: dict[str, Float[Array, "rows 1"]]
    vectors: dict[str, Array]


class TrainState(NamedTuple):
    """Weights, and Adam's moments of their gradients.

    Args:
        weights: The weights so far.
        mean: The running mean of their gradients.
        square: The running mean of the squared gradients.
        steps: The number of steps so far.
    """

    weights: TrainedWeights
    mean: TrainedWeights
    square: TrainedWeights
    steps: Int[Array, ""]


class TrainingBatch(NamedTuple):
    """A padded batch of texts, and the rows of the embedding table that it reads.

    Args:
        ids: The token ids of the texts.
        lengths: The numbers of tokens; empty texts do not count.
        rows: The table's rows that the batch reads, each once; the padding is no row of any table.
        local_ids: The index of each id among those rows.
    """

    ids: Int[Array, "batch tokens"]
    lengths: Int[Array, "batch"]
    rows: Int[Array, "rows"]
    local_ids: Int[Array, "batch tokens"]


def training_batch(batch: Batch) -> TrainingBatch:
    """Find the rows of the embedding table that a batch reads.

    >>> training_batch((np.array([[7, 3, 7]]), np.array([3]))).rows.tolist()
    [3, 7, 2147483647]
    """
    ids, lengths = batch
    rows, local_ids = np.unique(ids, return_inverse=True)
    padded_rows = np.full(ids.size, np.iinfo(np.int32).max, np.int32)
    padded_rows[: len(rows)] = rows
    return TrainingBatch(*map(jnp.asarray, (ids, lengths, padded_rows, local_ids.astype(np.int32))))


class Distiller:
    """The training step of one model.

    Args:
        model: The teacher, the float model.
        quantized: The student, its copy with quantized weights; those that are not trained stay.
        solved: The calibrated weights that are trained, by path.
        symmetric: The paths of those whose zero points are constant, and stay.
        sentences: How hidden states become embeddings.
    """

    def __init__(
        self,
        model: Model,
        quantized: Model,
        solved: Mapping[str, QTensor],
        symmetric: Collection[str],
        sentences: SentenceSettings,
    ) -> None:
        self._solved, self._symmetric = dict(solved), frozenset(symmetric)
        self._specs = {path: q.spec for path, q in solved.items() if q.spec.coding.uniform}
        self._sentences, self._table = sentences, model.table
        (self._teacher, teacher), (self._student, student) = split_module(model), split_module(quantized)
        unscaled = self._student.merge(student)  # weights whose codes stay, without the scales that are trained
        for path in solved.keys() - self._specs.keys():
            set_weight(unscaled, path, unit_values(solved[path]))
        self._student, student = split_module(unscaled)
        self.leaves = teacher, student
        self._compiled_step = jax.jit(self._step, donate_argnums=0, compiler_options=dict(COMPILER_OPTIONS[backend()]))
        self._shapes: set[tuple[int, ...]] = set()

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far."""
        return len(self._shapes)

    def start(self, model: Model, vectors: Mapping[str, Array]) -> TrainState:
        """Build the state in which training starts, at calibrated codes and scales.

        Args:
            model: The float model.
            vectors: The norms and biases that are trained, by path.
        """
        latents = {path: init_latent(self._solved[path], get_weight(model, path)) for path in self._specs}
        log_scales = {path: jnp.log(q.scale) for path, q in self._solved.items() if path not in self._specs}
        weights = TrainedWeights(latents, log_scales, {path: jnp.array(each) for path, each in vectors.items()})
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return TrainState(weights, zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros((), jnp.int32))

    def step(self, state: TrainState, batch: Batch, rate: float) -> tuple[TrainState, Float[Array, ""]]:
        """Train on one batch: return the new state and the loss; the old state's buffers are donated."""
        self._shapes.add(batch[0].shape)
        return self._compiled_step(state, *self.leaves, training_batch(batch), np.float32(rate))

    def _step(
        self, state: TrainState, teacher: list[Any], student: list[Any], texts: TrainingBatch, rate: Float[Array, ""]
    ) -> tuple[TrainState, Float[Array, ""]]:
        teacher_hidden = self.teacher_hidden(teacher, texts)
        parts = state.weights, state.mean, state.square
        taken, mean, square = (take_rows(part, self._table, texts.rows) for part in parts)
        loss, gradient = jax.value_and_grad(self.loss)(taken, student, teacher_hidden, texts)
        adam: Any = optax.ScaleByAdamState(state.steps, cast(Any, mean), cast(Any, square))
        update, adam = ADAM.update(gradient, adam)
        moved = jax.tree.map(lambda w, u, r: w - rate * r * u, taken, update, self._learning_rates(taken))
        moved = moved._replace(latents={p: clip_latent(each, self._specs[p]) for p, each in moved.latents.items()})
        new = zip(parts, (moved, adam.mu, adam.nu), strict=True)
        return TrainState(
            *(_put_rows(whole, part, self._table, texts.rows) for whole, part in new), steps=adam.count
        ), loss

    def teacher_hidden(self, teacher: list[Any], texts: TrainingBatch) -> list[Float[Array, "batch tokens width"]]:
        """Run the float model, whose leaves these are, and return its hidden states."""
        return _hidden_states(self._teacher.merge(teacher), texts.ids, texts.lengths)

    def loss(
        self,
        weights: TrainedWeights,
        student: list[Any],
        teacher_hidden: list[Float[Array, "batch tokens width"]],
        texts: TrainingBatch,
    ) -> Float[Array, ""]:
        """Compute the loss of one batch.

        Args:
            weights: The trained weights; of the embedding table's latents, the batch's rows.
            student: The leaves of the quantized model; weights whose codes stay are without their scales, and others
                that are trained are not read.
            teacher_hidden: The float model's hidden states.
            texts: The batch.
        """
        model = self._student.merge(student)
        for path, latent in weights.latents.items():
            weight = latent_to_float(latent, self._specs[path])
            get_parameter(model, path).set_value(weight.T if path.endswith(".kernel") else weight)
        for path, log_scale in weights.log_scales.items():
            parameter, scale = get_parameter(model, path), stored_scale(log_scale)
            levels = parameter[...]
            if path == self._table:
                levels, scale = _take(levels, texts.rows), _take(scale, texts.rows)
            parameter.set_value(levels * (scale.T if path.endswith(".kernel") else scale))
        for path, vector in weights.vectors.items():
            get_parameter(model, path).set_value(vector)
        hidden = _hidden_states(model, texts.local_ids if self._table in self._solved else texts.ids, texts.lengths)
        return distillation_loss(hidden, teacher_hidden, texts.lengths, self._sentences)

    def _learning_rates(self, weights: TrainedWeights) -> TrainedWeights:
        """Return the learning rate of each part, relative to the run's, in the structure of the weights."""
        make: Any = Latent
        latents = {
            path: make(
                TABLE_CODES_RATE if path == self._table else CODES_RATE,
                SCALES_RATE,
                0.0 if path in self._symmetric else ZERO_POINTS_RATE,
            )
            for path in self._specs
        }
        log_scales: Any = {
            path: TABLE_SCALES_RATE if path == self._table else SCALES_RATE for path in weights.log_scales
        }
        return TrainedWeights(latents, log_scales, cast(Any, dict.fromkeys(weights.vectors, VECTORS_RATE)))


def take_rows(weights: TrainedWeights, table: str, rows: Int[Array, "found"]) -> TrainedWeights:
    """Take the rows of the embedding table that a batch reads, if it has latents; keep all else whole."""
    return _map_table(weights, table, lambda whole: _take(whole, rows), weights)


def _put_rows(weights: TrainedWeights, part: TrainedWeights, table: str, rows: Int[Array, "found"]) -> TrainedWeights:
    """Put the rows that `take_rows` took back into the table."""
    return _map_table(part, table, lambda whole, some: whole.at[rows].set(some, mode="drop"), weights, part)


def _map_table(
    weights: TrainedWeights, table: str, change: Callable[..., Array], *given: TrainedWeights
) -> TrainedWeights:
    if table not in weights.latents:
        return weights
    return weights._replace(
        latents=weights.latents | {table: jax.tree.map(change, *(each.latents[table] for each in given))}
    )


def _take(whole: Array, rows: Int[Array, "found"]) -> Array:
    """Take the rows that a batch reads; the padding takes any."""
    return whole.at[rows].get(mode="clip")


def _hidden_states(model: Model, ids: Array, lengths: Array) -> list[Float[Array, "batch tokens width"]]:
    """Run a model, and return the output of each layer; of the last one, after the final norm."""
    x, out = model.begin(ids), []
    for layer in model.layers:
        x = layer(x, token_mask(x, lengths))
        out.append(x)
    return [*out[:-1], model.end(out[-1])]


def distillation_loss(
    hidden: list[Float[Array, "batch tokens width"]],
    teacher_hidden: list[Float[Array, "batch tokens width"]],
    lengths: Int[Array, "batch"],
    sentences: SentenceSettings,
) -> Float[Array, ""]:
    """Compute the loss (see above); texts of no tokens do not count."""
    mask, count = token_mask(teacher_hidden[0], lengths), jnp.maximum(jnp.sum(lengths > 0, dtype=jnp.float32), 1)
    a, b = (sentences.unit_embeddings(each[-1], mask) for each in (hidden, teacher_hidden))
    own = jnp.sum(jnp.where(lengths > 0, 1 - jnp.sum(a * b, -1), 0.0)) / count
    parts = [
        jnp.sum(jnp.where(mask[..., None], h - g, 0.0) ** 2) / jnp.sum(jnp.where(mask[..., None], g, 0.0) ** 2)
        for h, g in zip(hidden, teacher_hidden, strict=True)
    ]
    among = jnp.where((lengths > 0)[:, None] & (lengths > 0)[None], a @ a.T - b @ b.T, 0.0)
    return own + sum(parts) / len(parts) + jnp.sum(among**2) / count**2
