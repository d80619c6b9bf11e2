"""One training step: a quantized encoder is moved towards the float one's hidden states and embeddings.

The loss of a batch is the sum of
  - 1 - cosine between the two models' sentence embeddings, mean over sentences;
  - the squared difference of hidden states, of the mean square of the float ones, mean over layers;
  - the squared difference of the cosines between any two sentences of the batch.
No label is needed. (As in TinyBERT, X. Jiao et al., arXiv:1909.10351; of relations, W. Park et al., arXiv:1904.05068.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from aq_jax.calibration.latent import Latent, bounded, latent, value
from aq_jax.calibration.layerwise import parameter, weight_of
from aq_jax.calibration.text import Batch
from aq_jax.calibration.walk import mask_of
from aq_jax.config import QuantSpec
from aq_jax.core.dispatch import COMPILER_OPTIONS, backend
from aq_jax.core.qtensor import QTensor
from aq_jax.nn.compiled import split
from aq_jax.nn.models import Model
from aq_jax.nn.sentences import Sentences

ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)
# Learning rates, of the run's. Those of a table are higher: a row of it is seen in few steps.
CODES, TABLE_CODES, SCALES, ZERO_POINTS, PLAIN = 1.0, 2.0, 0.6, 1.0, 0.2


class Weights(NamedTuple):
    """What is trained, by path.

    Args:
        latents: of quantized matrices, as [outputs, inputs].
        plain: norms and biases.
    """

    latents: dict[str, Latent]
    plain: dict[str, Array]


class State(NamedTuple):
    """Weights, and Adam's moments of their gradients.

    Args:
        weights: trained so far.
        mean: of their gradients, lately.
        square: of those, likewise.
        steps: so far.
    """

    weights: Weights
    mean: Weights
    square: Weights
    steps: Int[Array, ""]


class Lesson(NamedTuple):
    """One batch.

    Args:
        ids: of its texts.
        lengths: of its texts; empty ones do not count.
        rows: of the table that it reads, each once; those that fill up are no row of any table.
        local: where among them each id is.
    """

    ids: Int[Array, "batch tokens"]
    lengths: Int[Array, "batch"]
    rows: Int[Array, "rows"]
    local: Int[Array, "batch tokens"]


def lesson(batch: Batch) -> Lesson:
    """A batch, and which rows of the table it reads.

    >>> lesson((np.array([[7, 3, 7]]), np.array([3]))).rows.tolist()
    [3, 7, 2147483647]
    """
    ids, lengths = batch
    rows, local = np.unique(ids, return_inverse=True)
    filled = np.full(ids.size, np.iinfo(np.int32).max, np.int32)
    filled[: len(rows)] = rows
    return Lesson(*map(jnp.asarray, (ids, lengths, filled, local.astype(np.int32))))


class Distiller:
    """The training step of one model.

    Args:
        model: in float, the teacher.
        quantized: the same with all weights as they are quantized; those that are not trained stay.
        specs: of the quantized weights that are trained, by path.
        symmetric: those of them whose zero points are constant, and stay.
        said: of sentences: what embeddings are.
    """

    def __init__(
        self,
        model: Model,
        quantized: Model,
        specs: Mapping[str, QuantSpec],
        symmetric: Collection[str],
        said: Sentences,
    ) -> None:
        self._specs, self._symmetric = dict(specs), frozenset(symmetric)
        self._said, self._table = said, model.table
        (self._teacher, teacher), (self._student, student) = split(model), split(quantized)
        self.leaves = teacher, student
        self._run = jax.jit(self._step, donate_argnums=0, compiler_options=dict(COMPILER_OPTIONS[backend()]))
        self._shapes: set[tuple[int, ...]] = set()

    @property
    def compiles(self) -> int:
        """How many programs there are so far."""
        return len(self._shapes)

    def start(self, model: Model, solved: Mapping[str, QTensor], plain: Mapping[str, Array]) -> State:
        """Where training begins: at calibrated codes and scales.

        Args:
            model: in float.
            solved: of the paths of `specs`.
            plain: norms and biases that are trained, by path.
        """
        latents = {path: latent(solved[path], weight_of(model, path)) for path in self._specs}
        weights = Weights(latents, {path: jnp.array(each) for path, each in plain.items()})
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return State(weights, zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros((), jnp.int32))

    def step(self, state: State, batch: Batch, rate: float) -> tuple[State, Float[Array, ""]]:
        """The state after one batch, and the batch's loss; the state that is given is used up."""
        self._shapes.add(batch[0].shape)
        return self._run(state, *self.leaves, lesson(batch), np.float32(rate))

    def _step(
        self, state: State, teacher: list[Any], student: list[Any], texts: Lesson, rate: Float[Array, ""]
    ) -> tuple[State, Float[Array, ""]]:
        goal = self.goal(teacher, texts)
        parts = state.weights, state.mean, state.square
        taken, mean, square = (rows_of(part, self._table, texts.rows) for part in parts)
        loss, gradient = jax.value_and_grad(self.loss)(taken, student, goal, texts)
        adam: Any = optax.ScaleByAdamState(state.steps, cast(Any, mean), cast(Any, square))
        update, adam = ADAM.update(gradient, adam)
        moved = jax.tree.map(lambda w, u, r: w - rate * r * u, taken, update, self._rates(taken))
        moved = moved._replace(latents={p: bounded(each, self._specs[p]) for p, each in moved.latents.items()})
        new = zip(parts, (moved, adam.mu, adam.nu), strict=True)
        return State(*(_put_rows(whole, part, self._table, texts.rows) for whole, part in new), steps=adam.count), loss

    def goal(self, teacher: list[Any], texts: Lesson) -> list[Float[Array, "batch tokens width"]]:
        """Hidden states of the float model, of these leaves."""
        return _hidden(self._teacher.merge(teacher), texts.ids, texts.lengths)

    def loss(
        self, weights: Weights, student: list[Any], goal: list[Float[Array, "batch tokens width"]], texts: Lesson
    ) -> Float[Array, ""]:
        """How far the quantized model is from the goal.

        Args:
            weights: that are trained; of the table, the rows of these texts.
            student: leaves of the quantized model, of which those that are trained are not read.
            goal: of the float model.
            texts: one batch.
        """
        model = self._student.merge(student)
        for path, of in weights.latents.items():
            weight = value(of, self._specs[path])
            parameter(model, path).set_value(weight.T if path.endswith(".kernel") else weight)
        for path, plain in weights.plain.items():
            parameter(model, path).set_value(plain)
        hidden = _hidden(model, texts.local if self._table in self._specs else texts.ids, texts.lengths)
        return distance(hidden, goal, texts.lengths, self._said)

    def _rates(self, weights: Weights) -> Weights:
        """How fast each part moves, of the learning rate; shaped as the weights."""
        latent: Any = Latent
        latents = {
            path: latent(
                TABLE_CODES if path == self._table else CODES, SCALES, 0.0 if path in self._symmetric else ZERO_POINTS
            )
            for path in self._specs
        }
        return Weights(latents, cast(Any, dict.fromkeys(weights.plain, PLAIN)))


def rows_of(weights: Weights, table: str, rows: Int[Array, "found"]) -> Weights:
    """The rows of the table at this path that a batch reads, if it is trained; all else whole."""
    return _on_table(weights, table, lambda whole: whole.at[rows].get(mode="clip"), weights)


def _put_rows(weights: Weights, part: Weights, table: str, rows: Int[Array, "found"]) -> Weights:
    """A part that `rows_of` took, put back."""
    return _on_table(part, table, lambda whole, some: whole.at[rows].set(some, mode="drop"), weights, part)


def _on_table(weights: Weights, table: str, change: Callable[..., Array], *given: Weights) -> Weights:
    if table not in weights.latents:
        return weights
    return weights._replace(
        latents=weights.latents | {table: jax.tree.map(change, *(each.latents[table] for each in given))}
    )


def _hidden(model: Model, ids: Array, lengths: Array) -> list[Float[Array, "batch tokens width"]]:
    """Give what each layer gives; of the last one, hidden states."""
    x, out = model.begin(ids), []
    for layer in model.layers:
        x = layer(x, mask_of(x, lengths))
        out.append(x)
    return [*out[:-1], model.end(out[-1])]


def distance(
    hidden: list[Float[Array, "batch tokens width"]],
    goal: list[Float[Array, "batch tokens width"]],
    lengths: Int[Array, "batch"],
    said: Sentences,
) -> Float[Array, ""]:
    """The loss (see above); texts of no tokens do not count."""
    mask, count = mask_of(goal[0], lengths), jnp.maximum(jnp.sum(lengths > 0, dtype=jnp.float32), 1)
    a, b = (said.directions(each[-1], mask) for each in (hidden, goal))
    own = jnp.sum(jnp.where(lengths > 0, 1 - jnp.sum(a * b, -1), 0.0)) / count
    parts = [
        jnp.sum(jnp.where(mask[..., None], h - g, 0.0) ** 2) / jnp.sum(jnp.where(mask[..., None], g, 0.0) ** 2)
        for h, g in zip(hidden, goal, strict=True)
    ]
    among = jnp.where((lengths > 0)[:, None] & (lengths > 0)[None], a @ a.T - b @ b.T, 0.0)
    return own + sum(parts) / len(parts) + jnp.sum(among**2) / count**2
