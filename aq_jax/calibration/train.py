"""Train a whole encoder quantization-aware, starting from its calibrated weights.

The learning rate warms up over a few steps, and then falls along a half cosine with the share of the run that is done:
of its steps or of its time, whichever is more. Nearly all of the gain comes while it falls, so that it must fall in a
run that the clock ends, too. For the same reason, a run whose held-out texts stop improving does not end, but skips to
its last part. Without a limit of time a run depends on its seed alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from aq_jax.calibration.checkpoints import Checkpoints
from aq_jax.calibration.distill import Distiller, TrainState
from aq_jax.calibration.latent import latent_to_qtensor
from aq_jax.calibration.layerwise import copy_vectors, set_weight
from aq_jax.calibration.row_scales import with_scales
from aq_jax.calibration.sensitivity import FloatOutputs
from aq_jax.calibration.text import Batch, choose_padded_lengths, pad_batch
from aq_jax.config import QuantizationConfig, TrainingConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError
from aq_jax.nn.models import Model
from aq_jax.nn.sentences import SentenceSettings
from aq_jax.ops import dequantize
from aq_jax.progress import Progress

BATCH_SHAPES = 6  # one more is a program more, and less padding
EVALUATIONS = 20  # in a run; each writes a checkpoint
LAST_PART = 0.8  # the share of a run to which it skips when nothing improves
WARM_UP_STEPS, LEAST_RATE = 30, 0.02
PROGRESS_UNITS = 1000  # in a run, for a progress bar


class ShuffledBatches:
    """Texts in batches of few shapes, shuffled in each epoch; any step's batch can be had directly.

    Args:
        ids: Each text's token ids.
        tokens: The number of tokens in a batch, with padding.
        seed: The random seed of the order.
    """

    def __init__(self, ids: Sequence[Sequence[int]], tokens: int, seed: int) -> None:
        self._ids, self._tokens, self._seed = ids, tokens, seed
        lengths = [len(text) for text in ids]
        self._padded = choose_padded_lengths(lengths, BATCH_SHAPES)
        self._length_index = np.searchsorted(self._padded, lengths)
        self._epoch, self._order = -1, self._batches(0)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step; the first is step 0."""
        epoch, i = divmod(step, len(self._order))  # every epoch has as many
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._batches(epoch)
        length, members = self._order[i]
        return pad_batch([self._ids[member] for member in members], self._batch_rows(length), length)

    def _batch_rows(self, length: int) -> int:
        return max(1, self._tokens // length)

    def _batches(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng, batches = np.random.default_rng((self._seed, epoch)), []
        for i, length in enumerate(self._padded):
            members, rows = rng.permutation(np.flatnonzero(self._length_index == i)), self._batch_rows(length)
            batches += [(length, members[start : start + rows]) for start in range(0, len(members), rows)]
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass
class TrainingResult:
    """The result of training a model.

    Args:
        weights: Quantized weights by path; linears as [outputs, inputs].
        vectors: Norms and biases by path.
        record: The record of the run, for the table's metadata.
        notes: Notes about the run.
    """

    weights: dict[str, QTensor]
    vectors: dict[str, Array]
    record: dict[str, Any]
    notes: list[str]


@dataclass
class _RunState:
    """The state of a run, beside its weights."""

    step: int = 0
    seconds: float = 0.0
    ahead: float = 0.0  # the share of the run that was skipped because nothing improved
    due: int = 0  # evaluations that were due so far
    since_best: int = 0  # evaluations since the best one
    best_error: float = math.inf
    curve: list[list[float]] = field(default_factory=list)  # [step, held-out cosine]


def train(
    model: Model,
    quantized: Model,
    solved: Mapping[str, QTensor],
    policies: Mapping[str, QuantizationConfig],
    ids: Sequence[Sequence[int]],
    outputs: FloatOutputs,
    sentences: SentenceSettings,
    config: TrainingConfig,
    seed: int,
    checkpoints: Checkpoints,
    round_as_stored: Callable[[dict[str, Array]], dict[str, Array]] = dict,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train the weights that calibration quantized, and norms and biases with them.

    Args:
        model: The float model.
        quantized: Its copy with dequantized weights; it holds the trained ones in the end.
        solved: The calibrated weights by path.
        policies: The configs of those weights.
        ids: The token ids of the texts to train on.
        outputs: The float model's outputs on other texts, by which the best weights of the run are chosen.
        sentences: How hidden states become embeddings.
        config: The training's config.
        seed: The random seed of the texts' order.
        checkpoints: The checkpoints, from which an interrupted run continues.
        round_as_stored: A function that rounds norms and biases as a table will.
        progress: A callback that gets a word, how much was just done, and how much there is to do.

    Raises:
        AqError: if the loss is not finite.
        ConfigError, IntegrityError: for checkpoints of another training, or damaged ones.
    """
    symmetric = [path for path in solved if policies[path].symmetric]
    distiller = Distiller(model, quantized, solved, symmetric, sentences)
    texts = ShuffledBatches(ids, config.batch_tokens, seed)
    state = distiller.start(model, copy_vectors(quantized))
    before = outputs.distance(quantized)
    best, run = (dict(solved), copy_vectors(quantized)), _RunState(best_error=before)
    if (found := checkpoints.load((state, best))) is not None:
        _, (state, best), known = found
        state, run = jax.tree.map(jnp.array, state), _RunState(**known)
    resumed, began, told, durations, failures = run.step, time.perf_counter() - run.seconds, 0, [], []
    while (part := _share_done(run, config)) < 1:
        start, rate = time.perf_counter(), config.learning_rate * _relative_rate(run.step, part)
        state, loss = distiller.step(state, texts.batch(run.step), rate)
        if not math.isfinite(loss):
            raise AqError(f"training: the loss is {float(loss)} at step {run.step}; lower train.learning_rate")
        durations.append(time.perf_counter() - start)
        run.step, run.seconds = run.step + 1, time.perf_counter() - began
        part = _share_done(run, config)
        if progress is not None:
            progress(
                f"training: held-out cosine {1 - run.best_error:.4f}", int(PROGRESS_UNITS * part) - told, PROGRESS_UNITS
            )
            told = int(PROGRESS_UNITS * part)
        if int(EVALUATIONS * part) == run.due:
            continue
        run.due = int(EVALUATIONS * part)
        now = _weights_as_stored(state, solved, round_as_stored)
        _set_weights(quantized, now)
        error = outputs.distance(quantized)
        run.curve.append([run.step, 1 - error])
        run.since_best += 1
        if error < run.best_error:
            best, run.best_error, run.since_best = now, error, 0
        if run.since_best >= config.patience and not run.ahead:
            run.ahead = max(0.0, LAST_PART - part)
        run.seconds = time.perf_counter() - began
        try:
            checkpoints.save(run.step, (state, best), asdict(run))
        except AqError as error:  # the table, which is far smaller, may still fit
            failures = [str(error)]
    _set_weights(quantized, best)
    early = f"{config.patience} evaluations without an improvement, and then " if run.ahead else ""
    by_clock = not run.ahead and run.step < config.steps
    record = {
        "steps": run.step, "stopped": f"{early}{f'its {config.minutes:g} minutes' if by_clock else 'its last step'}",
        "texts": len(ids), "learning_rate": config.learning_rate,
        "cosine_before": 1 - before, "cosine": 1 - run.best_error, "curve": run.curve, "seconds": run.seconds,
        "seconds_a_step": float(np.median(durations)) if durations else None,
        "compiles": distiller.compiles, "resumed_at": resumed,
    }  # fmt: skip
    return TrainingResult(*best, record, failures)


def _share_done(run: _RunState, config: TrainingConfig) -> float:
    spent = run.seconds / (60 * config.minutes) if config.minutes else 0.0
    return min(1.0, max(run.step / config.steps, spent) + run.ahead)


def _relative_rate(step: int, part: float) -> float:
    falling = LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * part)) / 2
    return falling * min(1.0, (step + 1) / WARM_UP_STEPS)


def _weights_as_stored(
    state: TrainState, solved: Mapping[str, QTensor], round_as_stored: Callable[[dict[str, Array]], dict[str, Array]]
) -> tuple[dict[str, QTensor], dict[str, Array]]:
    """Build the weights as they will be stored."""
    weights = state.weights
    quantized = {path: latent_to_qtensor(latent, solved[path].spec) for path, latent in weights.latents.items()}
    quantized |= {path: with_scales(solved[path], scale) for path, scale in weights.log_scales.items()}
    return quantized, round_as_stored(jax.tree.map(jnp.array, weights.vectors))  # copies: the state is donated


def _set_weights(model: Model, weights: tuple[Mapping[str, QTensor], Mapping[str, Array]]) -> None:
    for path, q in weights[0].items():
        set_weight(model, path, dequantize(jax.device_put(q)))
    for path, value in weights[1].items():
        set_weight(model, path, value)
