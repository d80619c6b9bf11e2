"""Quantization-aware training of a whole encoder, from where calibration has left it.

The learning rate rises over a few steps and then falls along a half cosine with the part of the run that is done: of
its steps, or of its time, whichever is more. Nearly all that is won is won while it falls, so that a run that is cut
off by the clock must have fallen, too. And so, where held-out texts get no better for a while, a run does not stop but
goes on with its last part. Without a limit of time a run depends on its seed alone.
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
from aq_jax.calibration.distill import Distiller, State
from aq_jax.calibration.latent import settled
from aq_jax.calibration.layerwise import put_weight, vectors
from aq_jax.calibration.sensitivity import Outputs
from aq_jax.calibration.text import Batch, padded, padded_lengths
from aq_jax.config import QuantizationConfig, QuantSpec, TrainingConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError
from aq_jax.nn.models import Model
from aq_jax.nn.sentences import Sentences
from aq_jax.ops import dequantize
from aq_jax.progress import Progress

SHAPES = 6  # of batches: each is a program more, and less padding
EVALUATIONS = 20  # of a run; after each a checkpoint is written
LAST_PART = 0.8  # of a run: from where it goes on when nothing gets better
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
        notes: what to know of it.
    """

    weights: dict[str, QTensor]
    plain: dict[str, Array]
    record: dict[str, Any]
    notes: list[str]


@dataclass
class _Run:
    """Where a run stands, beside its weights."""

    step: int = 0
    seconds: float = 0.0
    ahead: float = 0.0  # of the run: how much was skipped because nothing got better
    due: int = 0  # evaluations so far that were due
    since_best: int = 0  # evaluations
    best_error: float = math.inf
    curve: list[list[float]] = field(default_factory=list)  # [step, held-out cosine]


def train(
    model: Model,
    quantized: Model,
    solved: Mapping[str, QTensor],
    policies: Mapping[str, QuantizationConfig],
    ids: Sequence[Sequence[int]],
    outputs: Outputs,
    said: Sentences,
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
        policies: of these.
        ids: of the texts to train on.
        outputs: of the float model on other texts, by which the best weights of the run are chosen.
        said: of sentences: what embeddings are.
        config: how long, and how fast.
        seed: of the order of texts.
        checkpoints: with what an interrupted run has left, this one goes on.
        stored: rounds norms and biases as a table will.
        progress: called with a word, how much was just done, and how much there is to do.

    Raises:
        AqError: if the loss is not finite.
        ConfigError, IntegrityError: for checkpoints that are of another training, or damaged.
    """
    specs = {path: q.spec for path, q in solved.items()}
    symmetric = [path for path in specs if policies[path].symmetric]
    distiller = Distiller(model, quantized, specs, symmetric, said)
    texts = Shuffled(ids, config.batch_tokens, seed)
    state = distiller.start(model, solved, vectors(quantized))
    before = outputs.change(quantized)
    best, run = (dict(solved), vectors(quantized)), _Run(best_error=before)
    if (found := checkpoints.load((state, best))) is not None:
        _, (state, best), known = found
        state, run = jax.tree.map(jnp.array, state), _Run(**known)
    resumed, began, told, durations, failures = run.step, time.perf_counter() - run.seconds, 0, [], []
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
        if int(EVALUATIONS * part) == run.due:
            continue
        run.due = int(EVALUATIONS * part)
        now = _settled(state, specs, stored)
        _put(quantized, now)
        error = outputs.change(quantized)
        run.curve.append([run.step, 1 - error])
        run.since_best += 1
        if error < run.best_error:
            best, run.best_error, run.since_best = now, error, 0
        if run.since_best >= config.patience and not run.ahead:
            run.ahead = max(0.0, LAST_PART - part)
        run.seconds = time.perf_counter() - began
        try:
            checkpoints.save(run.step, (state, best), asdict(run))
        except AqError as error:  # a table, which is far smaller, may still be written
            failures = [str(error)]
    _put(quantized, best)
    early = f"{config.patience} evaluations that were no better, and then " if run.ahead else ""
    by_clock = not run.ahead and run.step < config.steps
    record = {
        "steps": run.step, "stopped": f"{early}{f'its {config.minutes:g} minutes' if by_clock else 'its last step'}",
        "texts": len(ids), "learning_rate": config.learning_rate,
        "cosine_before": 1 - before, "cosine": 1 - run.best_error, "curve": run.curve, "seconds": run.seconds,
        "seconds_a_step": float(np.median(durations)) if durations else None,
        "compiles": distiller.compiles, "resumed_at": resumed,
    }  # fmt: skip
    return Trained(*best, record, failures)


def _part_done(run: _Run, config: TrainingConfig) -> float:
    spent = run.seconds / (60 * config.minutes) if config.minutes else 0.0
    return min(1.0, max(run.step / config.steps, spent) + run.ahead)


def _relative_rate(step: int, part: float) -> float:
    falling = LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * part)) / 2
    return falling * min(1.0, (step + 1) / WARM_UP)


def _settled(
    state: State, specs: Mapping[str, QuantSpec], stored: Callable[[dict[str, Array]], dict[str, Array]]
) -> tuple[dict[str, QTensor], dict[str, Array]]:
    """The weights as they will be stored."""
    quantized = {path: settled(of, specs[path]) for path, of in state.weights.latents.items()}
    return quantized, stored(jax.tree.map(jnp.array, state.weights.plain))  # of its own: the state is used up


def _put(model: Model, weights: tuple[Mapping[str, QTensor], Mapping[str, Array]]) -> None:
    for path, q in weights[0].items():
        put_weight(model, path, dequantize(jax.device_put(q)))
    for path, value in weights[1].items():
        put_weight(model, path, value)
