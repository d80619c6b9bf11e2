"""From a source of weights and a folder with its model's config to calibrated QTensors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from aq_jax.calibration.layerwise import Calibrated, calibrate
from aq_jax.calibration.text import BUILT_IN, Text, padded_batches, read_text, tokenized
from aq_jax.calibration.walk import Model
from aq_jax.config import BITS, CalibrationConfig, QuantizationConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.core.quantize import dequantize
from aq_jax.errors import AqError, ConfigError, FormatError
from aq_jax.nn.bert import BertConfig
from aq_jax.nn.encoder import Sentences
from aq_jax.nn.load import Architecture, read_architecture, read_sentences, read_tokenizer
from aq_jax.nn.weights import match_names
from aq_jax.pipeline import Progress, Solved, Source
from aq_jax.solvers.apply import quantize_tree
from aq_jax.solvers.gptq import check_gptq
from aq_jax.solvers.screen import is_quantizable


def solve_model(
    source: Source,
    folder: Path,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    progress: Progress | None = None,
    measure: Callable[[Model], Mapping[str, Any]] | None = None,
) -> Solved:
    """Solve by GPTQ what a config asks for; the other weights are quantized as the config says while the model runs.

    Two copies of the model in float32, and the hidden states of the text twice, are in memory.

    Args:
        source: of float weights.
        folder: holds config.json and tokenizer files.
        config: of the model.
        calibration: on which text the model runs, and how.
        progress: called with each tensor's name, its bytes, and the bytes of all.
        measure: given the quantized model; what it says is kept as `Solved.allocation`.

    Raises:
        ConfigError: for grids that GPTQ does not have, and for text that is none.
        FormatError: for a model that is not known here.
        AqError: for weights that are not finite, by name.
    """
    start = time.perf_counter()
    architecture, names = read_names(source, folder)
    text = read_text(calibration)
    ids, _ = read_ids(text.lines, folder, architecture, calibration)
    shapes = {name: shape for name, (shape, dtype) in source.shapes.items() if is_quantizable(shape, dtype)}
    policies = {name: config.for_tensor(name) for name in shapes}
    asked = {name: policy for name, policy in policies.items() if policy.calibrated and policy.quant_type in BITS}
    for name, policy in asked.items():
        check_gptq(policy.spec, shapes[name], name)
    weights = read_weights(source, names)
    specs = {path: asked[name].spec_for(shapes[name]) for path, name in names.items() if name in asked}
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

    done = calibrate(model, quantized, specs, padded_batches(ids), calibration, report)
    fallbacks = {names[path]: why for path, why in done.fallbacks.items()}
    fallbacks |= dict.fromkeys(asked.keys() - set(names.values()), "the model does not use it")
    record = text.record() | {
        "tokens": done.tokens, "correction": calibration.correction, "damping": calibration.damping,
        "output_errors": {names[path]: error for path, error in done.errors.items()},
    }  # fmt: skip
    solved = {names[path]: q for path, q in done.weights.items()}
    said = measure(quantized) if measure is not None else None
    return Solved(solved, fallbacks, tuple(notes_of(text, done)), record, time.perf_counter() - start, said)


def read_ids(
    lines: Sequence[str], folder: Path, architecture: Architecture, calibration: CalibrationConfig
) -> tuple[list[list[int]], Sentences]:
    """Token ids of lines as the model would be given them, and what the folder says of sentences; cut by both.

    Raises:
        FormatError: for damaged files.
        ConfigError: if there is no token in the lines.
    """
    positions = architecture.config.max_position_embeddings
    encoder = isinstance(architecture.config, BertConfig)
    said = read_sentences(folder, positions) if encoder else Sentences(max_tokens=positions)
    said = dataclasses.replace(said, max_tokens=min(calibration.max_tokens, said.max_tokens))
    tokenizer = read_tokenizer(folder, architecture.config.vocab_size)
    ids = tokenized(lines, tokenizer, said.max_tokens, said.lower_case)
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
    weights = {name: jnp.asarray(source.array(name), jnp.float32) for name in names.values()}
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
