"""From a source of weights and a folder with its model's config to calibrated, and trained, QTensors."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from blake3 import blake3
from jaxtyping import Array

from aq_jax._version import __version__
from aq_jax.calibration.checkpoints import Checkpoints
from aq_jax.calibration.layerwise import Calibrated, calibrate
from aq_jax.calibration.sensitivity import Outputs
from aq_jax.calibration.text import BUILT_IN, Text, padded_batches, read_text, tokenized
from aq_jax.calibration.train import train
from aq_jax.config import CalibrationConfig, QuantizationConfig, TrainingConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError, ConfigError, FormatError
from aq_jax.nn.architecture import Architecture, read_architecture
from aq_jax.nn.models import Model, model_types
from aq_jax.nn.sentences import Sentences, read_prepared, read_sentences
from aq_jax.nn.weights import match_names
from aq_jax.ops import dequantize
from aq_jax.progress import Progress
from aq_jax.quantizers.apply import quantize_tree
from aq_jax.quantizers.lookup import calibrated_by, fallback
from aq_jax.quantizers.treatment import is_weight

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

FEW = 64  # lines; with fewer, training is said to have had few


@dataclass(frozen=True, slots=True)
class Solved:
    """Weights that were quantized before, on the running model.

    Args:
        weights: QTensors by the tensors' names.
        fallbacks: why a tensor was not solved, and by what it is quantized instead, by name.
        notes: what to know of the text.
        record: of how they were made, for the table's metadata.
        seconds: that it took.
        allocation: how widths were chosen, and what came of it, for the table's metadata.
        replaced: what norms and biases have become, in the source's dtypes, by name.
        training: how weights were trained, and what came of it, for the table's metadata.
    """

    weights: Mapping[str, QTensor]
    fallbacks: Mapping[str, str]
    notes: tuple[str, ...]
    record: Mapping[str, Any]
    seconds: float
    allocation: Mapping[str, Any] | None = None
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Training:
    """That a model is trained.

    Args:
        config: how long, and how fast.
        checkpoints: the folder in which an interrupted training is found again.
        reserved: lines after those of the calibration that something else is measured on.
    """

    config: TrainingConfig
    checkpoints: Path
    reserved: int = 0


def solve_model(
    source: Source,
    folder: Path,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    progress: Progress | None = None,
    measure: Callable[[Model], Mapping[str, Any]] | None = None,
    training: Training | None = None,
) -> Solved:
    """Solve what a config asks the running model for; meanwhile the other weights are quantized as it says.

    Two copies of the model in float32 are in memory, the hidden states of the text twice, and what the linears of one
    layer are given: in all some ten times the hidden states, which are 4 bytes * width a token.

    Args:
        source: of float weights.
        folder: holds config.json and tokenizer files.
        config: of the model.
        calibration: on which text the model runs, and how.
        progress: called with each tensor's name, its bytes, and the bytes of all.
        measure: given the quantized model; what it says is kept as `Solved.allocation`.
        training: trains the model after calibration.

    Raises:
        ConfigError: for grids that a solver does not have, and for text that is none.
        FormatError: for a model that is not known here.
        AqError: for weights that are not finite, by name.
    """
    start = time.perf_counter()
    architecture, names = read_names(source, folder)
    if training is not None and architecture.family.task != "embed":
        found = architecture.fields["model_type"]
        raise ConfigError(f"[train]: found {found}; wanted an encoder: {model_types('embed')}")
    text, *further = drawn(calibration, training)
    ids, sentences = read_ids(text.lines, folder, architecture, calibration)
    shapes = {name: shape for name, (shape, dtype) in source.shapes.items() if is_weight(config, name, shape, dtype)}
    policies = {name: config.for_tensor(name) for name in shapes}
    solvers = {name: found for name, policy in policies.items() if policy.coded and (found := calibrated_by(policy))}
    asked = {name: policies[name] for name in solvers}
    for name, quantizer in solvers.items():
        quantizer.check(asked[name].spec_for(shapes[name], name), shapes[name], name)
    weights = read_weights(source, names)
    solvable = {path: asked[name] for path, name in names.items() if name in asked}
    others = {name: value for name, value in weights.items() if name not in asked}
    model = architecture.fill(weights, "float32", str(folder))
    rounded = {
        name: dequantize(value) if isinstance(value, QTensor) else value
        for name, value in quantize_tree(others, config).items()
    }
    quantized = architecture.fill(weights | rounded, "float32", str(folder))

    def report(path: str, size: int, total: int) -> None:
        if progress is not None:
            progress(f"calibrating {names[path]}", size, total)

    def unsolved(path: str) -> Array:
        name = names[path]
        value = quantize_tree({name: weights[name]}, fallback(asked[name]))[name]
        return dequantize(value) if isinstance(value, QTensor) else value

    done = calibrate(model, quantized, solvable, padded_batches(ids), calibration, unsolved, report)
    seconds, trained = time.perf_counter() - start, None
    if training is not None:
        if not done.weights:
            raise ConfigError(f"[train]: found no calibrated weight in {folder}; wanted one, which could be trained")
        dtypes = {path: source.shapes[name][1] for path, name in names.items()}

        def stored(plain: dict[str, Array]) -> dict[str, Array]:
            kept = quantize_tree({names[p]: np.asarray(each).astype(dtypes[p]) for p, each in plain.items()}, config)
            return {path: jnp.asarray(np.asarray(kept[names[path]], np.float32)) for path in plain}

        held, taught = (read_ids(each.lines, folder, architecture, calibration)[0] for each in further)
        settings = [config.to_dict(), dataclasses.asdict(calibration) | {"text": None}, sentences.record()]
        of = _fingerprint(weights, settings, training.config, [taught, held])
        with Checkpoints(training.checkpoints, of) as checkpoints:
            trained = train(
                model, quantized, done.weights, solvable, taught,
                Outputs(model, padded_batches(held), sentences), sentences, training.config,
                calibration.seed, checkpoints, stored, progress,
            )  # fmt: skip
        done.weights = trained.weights
        trained.record |= {"held_out": len(held), "text": further[1].record()}
        if len(taught) < FEW or len(held) < FEW // 4:
            trained.notes.append(f"trained on {len(taught)} lines, and judged by {len(held)}: take more text")
    fallbacks = {names[path]: why for path, why in done.fallbacks.items()}
    fallbacks |= dict.fromkeys(asked.keys() - set(names.values()), "the model does not use it")
    fallbacks = {name: f"{why}; quantized by {solvers[name].fallback}" for name, why in fallbacks.items()}
    record = text.record() | {
        "tokens": done.tokens, "correction": calibration.correction, "damping": calibration.damping,
        "output_errors": {names[path]: error for path, error in done.errors.items()},
    }  # fmt: skip
    return Solved(
        weights={names[path]: q for path, q in done.weights.items()},
        fallbacks=fallbacks,
        notes=(*notes_of(text, done), *(trained.notes if trained else ())),
        record=record,
        seconds=seconds,
        allocation=measure(quantized) if measure is not None else None,
        replaced={
            names[path]: np.asarray(value).astype(source.shapes[names[path]][1])
            for path, value in (trained.plain if trained else {}).items()
        },
        training=trained.record if trained else None,
    )


def drawn(calibration: CalibrationConfig, training: Training | None) -> list[Text]:
    """The lines to calibrate on; with training, those by which it is judged, and those to train on, too.

    Those of the calibration are trained on, too; those that training is judged by, and those that it reserves, are not.

    Raises:
        ConfigError: for text that is none, or too little for both.
    """
    if training is None:
        return [read_text(calibration)]
    config, first = training.config, calibration.sentences
    most = min(first + training.reserved + config.held_out + config.sentences, 2**24)
    text = read_text(dataclasses.replace(calibration, sentences=most))
    lines = text.lines[:first] + text.lines[first + training.reserved :]
    if len(lines) < 2:
        raise ConfigError(
            f"calibration.text = {calibration.text!r}: found {len(lines)} line to train with; wanted more, to train "
            "and to judge"
        )
    held_out = min(config.held_out, max(1, len(lines) // 10))
    first = min(first, len(lines) - held_out)
    calibrated, held = lines[:first], lines[first : first + held_out]
    taught = (calibrated + lines[first + held_out :])[: config.sentences]
    return [dataclasses.replace(text, lines=each) for each in (calibrated, held, taught)]


def _fingerprint(
    weights: Mapping[str, Array], settings: list[Any], training: TrainingConfig, texts: Sequence[list[list[int]]]
) -> dict[str, str]:
    """What decides how each step of a training goes; not when it ends."""
    state = blake3()
    for name in sorted(weights):
        state.update(name.encode())
        state.update(np.ascontiguousarray(weights[name]).reshape(-1).view(np.uint8).data)
    ends = dict.fromkeys(("steps", "minutes", "patience"))
    asked = [__version__, *settings, dataclasses.asdict(training) | ends]
    return {
        "weights": state.hexdigest(length=16),
        "settings": blake3(json.dumps(asked).encode()).hexdigest(length=16),
        "text": blake3(json.dumps(texts).encode()).hexdigest(length=16),
    }


def read_ids(
    lines: Sequence[str], folder: Path, architecture: Architecture, calibration: CalibrationConfig
) -> tuple[list[list[int]], Sentences]:
    """Token ids of lines as the model would be given them, and what the folder says of sentences; cut by both.

    Raises:
        FormatError: for damaged files.
        ConfigError: if there is no token in the lines.
    """
    config = architecture.config
    positions, embeds = config.max_position_embeddings, architecture.family.task == "embed"
    said = read_sentences(folder, positions, config.hidden_size) if embeds else Sentences(max_tokens=positions)
    said = dataclasses.replace(said, max_tokens=min(calibration.max_tokens, said.max_tokens))
    tokenizer = read_prepared(folder)
    ids = tokenized(lines, tokenizer, said.max_tokens, config.vocab_size, said.prompt())
    said = said.with_default_prompt(tokenizer)
    if not ids:
        raise ConfigError(f"calibration.text = {calibration.text!r}: the tokenizer finds no token in it")
    return ids, said


def read_names(source: Source, folder: Path) -> tuple[Architecture, dict[str, str]]:
    """A folder's model, and which stored tensor each of its parameters is, by path.

    Raises:
        FormatError: for a model that is not known here, and tensors that do not fit it.
    """
    architecture = read_architecture(folder)
    goals, wrong = match_names(source.shapes, architecture.names)
    if wrong:
        raise FormatError(f"{folder}: {len(wrong)} tensors do not fit the model: {'; '.join(sorted(wrong))}")
    return architecture, {path: name for path, (name, _) in goals.items()}


def read_weights(source: Source, names: Mapping[str, str]) -> dict[str, Array]:
    """The weights that a model uses, in float32, by name.

    Raises:
        AqError: for weights that are not finite, by name.
    """
    weights = {name: jnp.asarray(np.asarray(source.read(name)), jnp.float32) for name in names.values()}
    if bad := [name for name, value in weights.items() if not jnp.isfinite(value).all()]:
        raise AqError(f"{bad[0]}: holds numbers that are not finite, and a model with them cannot be run: repair it")
    return weights


def notes_of(text: Text, done: Calibrated) -> Iterator[str]:
    """What to know of the text that a model was calibrated on."""
    if text.name == BUILT_IN:
        yield (
            f"calibrated on {len(text.lines)} sentences of Python's reference manual: English, but about one subject; "
            "calibration.text = FILE takes text like that which the model will see"
        )
    most = max(q.shape[1] for q in done.weights.values()) if done.weights else 0
    if done.tokens < most:
        yield f"calibrated on {done.tokens} tokens, fewer than the {most} inputs of the widest layer: take more text"
