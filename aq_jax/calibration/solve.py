"""From a source of weights and a folder with its model's config to calibrated QTensors."""

from __future__ import annotations

import time
from pathlib import Path

import jax.numpy as jnp

from aq_jax.calibration.layerwise import calibrate
from aq_jax.calibration.text import padded_batches, read_text, tokenized
from aq_jax.config import BITS, CalibrationConfig, QuantizationConfig
from aq_jax.core.qtensor import QTensor
from aq_jax.core.quantize import dequantize
from aq_jax.errors import AqError, ConfigError, FormatError
from aq_jax.nn.load import read_architecture, read_tokenizer
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
) -> Solved:
    """Solve by GPTQ what a config asks for; the other weights are quantized as the config says while the model runs.

    Two copies of the model in float32, and the hidden states of the text twice, are in memory.

    Args:
        source: of float weights.
        folder: holds config.json and tokenizer files.
        config: of the model.
        calibration: on which text the model runs, and how.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError: for grids that GPTQ does not have, and for text that is none.
        FormatError: for a model that is not known here.
        AqError: for weights that are not finite, by name.
    """
    start = time.perf_counter()
    architecture = read_architecture(folder)
    goals, wrong = match_names(source.shapes, architecture.names)
    if wrong:
        raise FormatError(f"{folder}: {len(wrong)} tensors do not fit the model: {'; '.join(sorted(wrong))}")
    text = read_text(calibration)
    limit = min(calibration.max_tokens, architecture.config.max_position_embeddings)
    ids = tokenized(text.lines, read_tokenizer(folder, architecture.config.vocab_size), limit)
    if not ids:
        raise ConfigError(f"calibration.text = {calibration.text!r}: the tokenizer finds no token in it")
    shapes = {name: shape for name, (shape, dtype) in source.shapes.items() if is_quantizable(shape, dtype)}
    policies = {name: config.for_tensor(name) for name in shapes}
    asked = {name: policy for name, policy in policies.items() if policy.calibrated and policy.quant_type in BITS}
    for name, policy in asked.items():
        check_gptq(policy.spec, shapes[name], name)
    names = {path: name for path, (name, _) in goals.items()}
    weights = {name: jnp.asarray(source.array(name), jnp.float32) for name in names.values()}
    if bad := [name for name, value in weights.items() if not jnp.isfinite(value).all()]:
        raise AqError(f"{bad[0]}: holds numbers that are not finite, and a model with them cannot be run: repair it")
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

    done = calibrate(model, quantized, specs, padded_batches(ids, limit), calibration, report)
    fallbacks = {names[path]: why for path, why in done.fallbacks.items()}
    fallbacks |= dict.fromkeys(asked.keys() - set(names.values()), "the model does not use it")
    record = text.record() | {
        "tokens": done.tokens, "correction": calibration.correction, "damping": calibration.damping,
        "output_errors": {names[path]: error for path, error in done.errors.items()},
    }  # fmt: skip
    solved = {names[path]: q for path, q in done.weights.items()}
    return Solved(solved, fallbacks, record, time.perf_counter() - start)
