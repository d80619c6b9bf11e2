"""Turn a source of weights, and a folder with its model's config, into calibrated, and trained, QTensors."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from blake3 import blake3
from jaxtyping import Array

from aq_jax._version import __version__
from aq_jax.calibration.checkpoints import Checkpoints
from aq_jax.calibration.layerwise import calibrate
from aq_jax.calibration.notes import limit_notes, text_notes
from aq_jax.calibration.row_scales import check_trainable
from aq_jax.calibration.sensitivity import FloatOutputs
from aq_jax.calibration.text import Text, pad_batches, read_text, tokenize
from aq_jax.calibration.train import train
from aq_jax.config import CalibrationConfig, QuantizationConfig, TrainingConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError, ConfigError, FormatError
from aq_jax.nn.architecture import Architecture, read_architecture
from aq_jax.nn.models import Model, model_types
from aq_jax.nn.sentences import SentenceSettings, read_sentence_tokenizer, read_sentences
from aq_jax.nn.weights import match_names
from aq_jax.ops import dequantize
from aq_jax.progress import Progress
from aq_jax.quantizers.eligibility import not_finite
from aq_jax.quantizers.lookup import calibrated_quantizer, fallback_of, with_fallback
from aq_jax.quantizers.treatment import is_weight
from aq_jax.quantizers.tree import quantize_leaves

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

FEW_LINES = 64  # with fewer, a note says that training had little text


@dataclass(frozen=True, slots=True)
class SolvedWeights:
    """Weights that were quantized on the running model.

    Args:
        weights: QTensors by the tensors' names.
        fallbacks: The reason why a tensor was not solved, and the quantizer that takes it instead, by name.
        notes: Notes about the text.
        record: The record of the calibration, for the table's metadata.
        seconds: The time that the calibration took.
        allocation: The record of the chosen widths, for the table's metadata.
        replaced: Trained norms and biases in the source's dtypes, by name.
        training: The record of the training, for the table's metadata.
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
class TrainingRequest:
    """A request to train the model after calibration.

    Args:
        config: The training's config.
        checkpoints: The folder from which an interrupted training continues.
        reserved: The number of lines after the calibration's that are kept for other measurements.
    """

    config: TrainingConfig
    checkpoints: Path
    reserved: int = 0


def solve_model(
    source: Source,
    folder: Path,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    progress: Progress | None,
    measure: Callable[[Model], Mapping[str, Any]] | None,
    training: TrainingRequest | None,
) -> SolvedWeights:
    """Solve the weights whose solver runs the model; the other weights are quantized meanwhile as the config says.

    Memory holds two copies of the model in float32, the text's hidden states twice, and the inputs of one layer's
    linears in both: in all some twenty times the hidden states, which take 4 bytes * width a token, padding included.

    Args:
        source: The float weights.
        folder: The folder that holds config.json and tokenizer files.
        config: The model's config.
        calibration: The text on which the model runs, and how.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.
        measure: A function of the quantized model, whose result becomes `SolvedWeights.allocation`.
        training: The training that follows the calibration, if any.

    Raises:
        ConfigError: for grids that a solver does not have, codes that a training does not take, and for a file without
            text.
        FormatError: for a model of an unknown family.
        AqError: for weights that are not finite, by name.
    """
    start = time.perf_counter()
    architecture, names = match_tensors(source, folder)
    if training is not None and architecture.family.task != "embed":
        found = architecture.fields["model_type"]
        raise ConfigError(f"[train]: the model is a {found}; wanted an encoder: {model_types('embed')}")
    text, *further = draw_texts(calibration, training)
    ids, sentences, cut = tokenize_lines(text.lines, folder, architecture, calibration)
    shapes = {name: shape for name, (shape, dtype) in source.shapes.items() if is_weight(config, name, shape, dtype)}
    policies = {name: config.for_tensor(name, shape) for name, shape in shapes.items()}
    solvers = {
        name: found for name, policy in policies.items() if policy.coded and (found := calibrated_quantizer(policy))
    }
    asked = {name: policies[name] for name in solvers}
    # A matrix that the model adds to something, such as a table of biases, has no inputs.
    without_inputs = {name for path, name in names.items() if not path.endswith((".kernel", ".embedding"))}
    for name, quantizer in solvers.items():
        if name not in without_inputs:
            spec = asked[name].spec_for(shapes[name], name)
            quantizer.check(spec, shapes[name], name)
            if training is not None:
                check_trainable(spec.coding, name)
    weights = read_float_weights(source, names)
    solvable = {path: asked[name] for path, name in names.items() if name in asked and name not in without_inputs}
    others = {name: value for name, value in weights.items() if name not in asked}
    model = architecture.fill(weights, "float32", str(folder))
    dequantized = {
        name: dequantize(value) if isinstance(value, QTensor) else value
        for name, value in quantize_leaves(others, config)[0].items()
    }
    quantized = architecture.fill(weights | dequantized, "float32", str(folder))

    def report(path: str, size: int, total: int) -> None:
        if progress is not None:
            progress(f"calibrating {names[path]}", size, total)

    def fallback_value(path: str) -> Array:
        name = names[path]
        value = quantize_leaves({name: weights[name]}, with_fallback(asked[name]))[0][name]
        return dequantize(value) if isinstance(value, QTensor) else value

    done = calibrate(model, quantized, solvable, pad_batches(ids), calibration, fallback_value, report)
    seconds, trained = time.perf_counter() - start, None
    if training is not None:
        if not done.weights:
            raise ConfigError(f"[train]: no weight of {folder} was calibrated; wanted one or more to train")
        dtypes = {path: source.shapes[name][1] for path, name in names.items()}

        def round_as_stored(vectors: dict[str, Array]) -> dict[str, Array]:
            stored = {names[p]: np.asarray(each).astype(dtypes[p]) for p, each in vectors.items()}
            kept, _ = quantize_leaves(stored, config)
            return {path: jnp.asarray(np.asarray(kept[names[path]], np.float32)) for path in vectors}

        held, taught = (tokenize_lines(each.lines, folder, architecture, calibration)[0] for each in further)
        settings = [config.to_dict(), dataclasses.asdict(calibration) | {"text": None}, sentences.record()]
        fingerprint = _fingerprint(weights, settings, training.config, [taught, held])
        with Checkpoints(training.checkpoints, fingerprint) as checkpoints:
            trained = train(
                model, quantized, done.weights, solvable, taught,
                FloatOutputs(model, pad_batches(held), sentences), sentences, training.config,
                calibration.seed, checkpoints, round_as_stored, progress,
            )  # fmt: skip
        done.weights = trained.weights
        trained.record |= {"held_out": len(held), "text": further[1].record()}
        if len(taught) < FEW_LINES or len(held) < FEW_LINES // 4:
            trained.notes.append(
                f"trained on {len(taught)} lines, and judged by {len(held)}: more text would serve better"
            )
    fallbacks = {names[path]: why for path, why in done.fallbacks.items()}
    fallbacks |= dict.fromkeys(asked.keys() - set(names.values()), "the model does not use it")
    fallbacks |= dict.fromkeys(asked.keys() & without_inputs, "it has no inputs")
    fallbacks = {
        name: f"{why}; quantized by {fallback_of(asked[name], solvers[name])}" for name, why in fallbacks.items()
    }
    record = text.record() | {
        "max_tokens": calibration.max_tokens, "joined": calibration.joined,
        "tokens": done.tokens, "correction": calibration.correction, "damping": calibration.damping,
        "output_errors": {names[path]: error for path, error in done.errors.items()},
    }  # fmt: skip
    return SolvedWeights(
        weights={names[path]: q for path, q in done.weights.items()},
        fallbacks=fallbacks,
        notes=(
            *limit_notes(text, calibration, sentences.max_tokens, cut),
            *text_notes(text, done),
            *(trained.notes if trained else ()),
        ),
        record=record,
        seconds=seconds,
        allocation=measure(quantized) if measure is not None else None,
        replaced={
            names[path]: np.asarray(value).astype(source.shapes[names[path]][1])
            for path, value in (trained.vectors if trained else {}).items()
        },
        training=trained.record if trained else None,
    )


def draw_texts(calibration: CalibrationConfig, training: TrainingRequest | None) -> list[Text]:
    """Draw the lines to calibrate on; with training, also the lines to judge it by, and the lines to train on.

    The calibration's lines are trained on too; the lines to judge by and the reserved ones are not.

    Raises:
        ConfigError: for a file without text, or with too little for both.
    """
    if training is None:
        return [read_text(calibration)]
    config, first = training.config, calibration.sentences
    most = min(first + training.reserved + config.held_out + config.sentences, 2**24)
    text = read_text(dataclasses.replace(calibration, sentences=most))
    lines = text.lines[:first] + text.lines[first + training.reserved :]
    if len(lines) < 2:
        raise ConfigError(
            f"calibration.text = {calibration.text!r}: lines left for the training: {len(lines)}; wanted two or more, "
            "to train on and to judge by"
        )
    held_out = min(config.held_out, max(1, len(lines) // 10))
    first = min(first, len(lines) - held_out)
    calibrated, held = lines[:first], lines[first : first + held_out]
    taught = (calibrated + lines[first + held_out :])[: config.sentences]
    return [dataclasses.replace(text, lines=each) for each in (calibrated, held, taught)]


def _fingerprint(
    weights: Mapping[str, Array], settings: list[Any], training: TrainingConfig, texts: Sequence[list[list[int]]]
) -> dict[str, str]:
    """Digest all that decides a training's steps, and nothing that only decides when it ends."""
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


def tokenize_lines(
    lines: Sequence[str], folder: Path, architecture: Architecture, calibration: CalibrationConfig
) -> tuple[list[list[int]], SentenceSettings, int]:
    """Tokenize lines as the model gets them.

    Returns:
        The ids, the folder's settings for sentences, which cut them, and the number of lines that were cut.

    Raises:
        FormatError: for damaged files.
        ConfigError: if the lines hold no token.
    """
    config = architecture.config
    positions, embeds = config.max_position_embeddings, architecture.family.task == "embed"
    settings = (
        read_sentences(folder, positions, config.hidden_size) if embeds else SentenceSettings(max_tokens=positions)
    )
    settings = dataclasses.replace(settings, max_tokens=min(calibration.max_tokens, settings.max_tokens))
    tokenizer = read_sentence_tokenizer(folder)
    ids, cut = tokenize(lines, tokenizer, settings.max_tokens, config.vocab_size, settings.prompt())
    ids = [settings.counted(text) for text in ids]
    settings = settings.with_default_prompt(tokenizer)
    if not ids:
        raise ConfigError(f"calibration.text = {calibration.text!r}: the tokenizer finds no token in it")
    return ids, settings, cut


def match_tensors(source: Source, folder: Path) -> tuple[Architecture, dict[str, str]]:
    """Read a folder's architecture, and the name of the stored tensor for each parameter's path.

    Raises:
        FormatError: for a model of an unknown family, and tensors that do not fit it.
    """
    architecture = read_architecture(folder, {name: shape for name, (shape, _) in source.shapes.items()})
    goals, wrong = match_names(source.shapes, architecture.names)
    if wrong:
        raise FormatError(f"{folder}: {len(wrong)} tensors do not fit the model: {'; '.join(sorted(wrong))}")
    return architecture, {path: name for path, (name, _) in goals.items()}


def read_float_weights(source: Source, names: Mapping[str, str]) -> dict[str, Array]:
    """Read the weights that a model uses, in float32, by name.

    Raises:
        AqError: for weights that are not finite, by name.
    """
    weights = {name: jnp.asarray(np.asarray(source.read(name)), jnp.float32) for name in names.values()}
    for name, value in weights.items():
        if found := not_finite(np.asarray(value)):
            raise AqError(
                f"{name}: {found}; a model with such weights cannot run, whatever on_nonfinite says: repair it"
            )
    return weights
