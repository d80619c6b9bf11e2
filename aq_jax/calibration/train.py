"""Quantization-aware training of a whole encoder, from where calibration has left it.

The learning rate rises over a few steps and then falls along a half cosine with the part of the run that is done: of
its steps, or of its time, whichever is more. Nearly all that is won is won while it falls, so that a run that is cut
off by the clock must have fallen, too. Without a limit of time a run depends on its seed alone.
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
from flax import nnx
from jaxtyping import Array

from aq_jax.calibration.checkpoints import Checkpoints
from aq_jax.calibration.distill import Distiller, State
from aq_jax.calibration.latent import settled
from aq_jax.calibration.layerwise import parameter
from aq_jax.calibration.sensitivity import Outputs
from aq_jax.calibration.text import Batch, padded, padded_lengths
from aq_jax.config import QuantSpec, TrainingConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.core.quantize import dequantize
from aq_jax.errors import AqError
from aq_jax.nn.bert import Bert, Pooling
from aq_jax.pipeline import Progress

SHAPES = 6  # of batches: each is a program more, and less padding
EVALUATIONS = 20  # of a run; after each a checkpoint is written
WARM_UP, LEAST_RATE = 30, 0.02
PARTS = 1000  # of a run, as a progress bar counts them


class Shuffled:
    """Texts in batches of few shapes, in another order in every epoch; the batch of any step is known at once.

    Args:
        ids: of each text.
        tokens: of a batch, padding counted.
        seed: of the order.
    """

    def __init__(self, ids: Sequence[Sequence[int]], tokens: int, seed: int) -> None:
        self._ids, self._tokens, self._seed = ids, tokens, seed
        lengths = [len(text) for text in ids]
        self._padded = padded_lengths(lengths, SHAPES)
        self._kind = np.searchsorted(self._padded, lengths)
        self._epoch, self._plan = -1, self._batches(0)

    def batch(self, step: int) -> Batch:
        """Of a step, which begin at 0."""
        epoch, i = divmod(step, len(self._plan))  # every epoch has as many
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._batches(epoch)
        length, members = self._plan[i]
        return padded([self._ids[member] for member in members], self._rows(length), length)

    def _rows(self, length: int) -> int:
        return max(1, self._tokens // length)

    def _batches(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng, plan = np.random.default_rng((self._seed, epoch)), []
        for kind, length in enumerate(self._padded):
            members, rows = rng.permutation(np.flatnonzero(self._kind == kind)), self._rows(length)
            plan += [(length, members[start : start + rows]) for start in range(0, len(members), rows)]
        return [plan[i] for i in rng.permutation(len(plan))]


@dataclass
class Trained:
    """What training made of a model.

    Args:
        weights: quantized, by path; linears as [outputs, inputs].
        plain: norms and biases, by path.
        record: of the run, for the table's metadata.
    """

    weights: dict[str, QTensor]
    plain: dict[str, Array]
    record: dict[str, Any]


@dataclass
class _Run:
    """Where a run stands, beside its weights."""

    step: int = 0
    seconds: float = 0.0
    best_error: float = math.inf
    best_mark: int = 0
    marks: int = 0  # evaluations that are due so far
    curve: list[list[float]] = field(default_factory=list)  # [step, held-out cosine]


def train(
    model: Bert,
    quantized: Bert,
    solved: Mapping[str, QTensor],
    ids: Sequence[Sequence[int]],
    outputs: Outputs,
    pooling: Pooling,
    config: TrainingConfig,
    seed: int,
    checkpoints: Checkpoints,
    stored: Callable[[dict[str, Array]], dict[str, Array]] = dict,
    progress: Progress | None = None,
) -> Trained:
    """Train what calibration has quantized, and norms and biases with it.

    Args:
        model: in float.
        quantized: the same with all weights as they are quantized; holds the trained ones in the end.
        solved: quantized weights by path.
        ids: of the texts to train on.
        outputs: of the float model on other texts, by which the best weights of the run are chosen.
        pooling: of sentences.
        config: how long, and how fast.
        seed: of the order of texts.
        checkpoints: with what an interrupted run has left, this one goes on.
        stored: rounds norms and biases as a table will.
        progress: called with a word, how much was just done, and how much there is to do.

    Raises:
        AqError: if the loss is not finite.
        ConfigError, IntegrityError: for checkpoints that are of another training, or damaged.
    """
    distiller = Distiller(model, quantized, {path: q.spec for path, q in solved.items()}, pooling)
    texts = Shuffled(ids, config.batch_tokens, seed)
    state = distiller.start(model, solved, _vectors(quantized))
    before = outputs.change(quantized)
    best, run = (dict(solved), _vectors(quantized)), _Run(best_error=before)
    if (found := checkpoints.load((state, best))) is not None:
        _, (state, best), notes = found
        state, run = jax.tree.map(jnp.array, state), _Run(**notes)
    resumed, began, told, durations = run.step, time.perf_counter() - run.seconds, 0, []
    stopped = "its last step"
    while (part := _part_done(run, config)) < 1:
        start, rate = time.perf_counter(), config.learning_rate * _relative_rate(run.step, part)
        state, loss = distiller.step(state, texts.batch(run.step), rate)
        if not math.isfinite(loss):
            raise AqError(f"training: the loss is {float(loss)} at step {run.step}; lower train.learning_rate")
        durations.append(time.perf_counter() - start)
        run.step, run.seconds = run.step + 1, time.perf_counter() - began
        part = _part_done(run, config)
        if progress is not None:
            progress(f"training: held-out cosine {1 - run.best_error:.4f}", int(PARTS * part) - told, PARTS)
            told = int(PARTS * part)
        if int(EVALUATIONS * part) == run.marks:
            continue
        run.marks = int(EVALUATIONS * part)
        now = _settled(state, {path: q.spec for path, q in solved.items()}, stored)
        _put(quantized, now)
        error = outputs.change(quantized)
        run.curve.append([run.step, 1 - error])
        if error < run.best_error:
            best, run.best_error, run.best_mark = now, error, run.marks
        run.seconds = time.perf_counter() - began
        checkpoints.save(run.step, (state, best), asdict(run))
        if run.marks - run.best_mark >= config.patience:
            stopped = f"{config.patience} evaluations that were no better"
            break
    else:
        if run.step < config.steps:
            stopped = f"its {config.minutes:g} minutes"
    _put(quantized, best)
    record = {
        "steps": run.step, "stopped": stopped, "texts": len(ids), "learning_rate": config.learning_rate,
        "cosine_before": 1 - before, "cosine": 1 - run.best_error, "curve": run.curve, "seconds": run.seconds,
        "seconds_a_step": float(np.median(durations)) if durations else None,
        "compiles": distiller.compiles, "resumed_at": resumed,
    }  # fmt: skip
    return Trained(*best, record)


def _part_done(run: _Run, config: TrainingConfig) -> float:
    spent = run.seconds / (60 * config.minutes) if config.minutes else 0.0
    return min(1.0, max(run.step / config.steps, spent))


def _relative_rate(step: int, part: float) -> float:
    falling = LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * part)) / 2
    return falling * min(1.0, (step + 1) / WARM_UP)


def _settled(
    state: State, specs: Mapping[str, QuantSpec], stored: Callable[[dict[str, Array]], dict[str, Array]]
) -> tuple[dict[str, QTensor], dict[str, Array]]:
    """The weights as they will be stored."""
    quantized = {path: settled(of, specs[path]) for path, of in state.weights.latents.items()}
    return quantized, stored(jax.tree.map(jnp.array, state.weights.plain))  # of its own: the state is used up


def _put(model: Bert, weights: tuple[Mapping[str, QTensor], Mapping[str, Array]]) -> None:
    for path, q in weights[0].items():
        value = dequantize(jax.device_put(q))
        parameter(model, path)[...] = value.T if path.endswith(".kernel") else value
    for path, value in weights[1].items():
        parameter(model, path)[...] = jnp.asarray(value)


def _vectors(model: Bert) -> dict[str, Array]:
    """Norms and biases, by path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): jnp.array(leaf[...]) for path, leaf in flat if leaf.ndim == 1}
