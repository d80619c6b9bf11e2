"""Allocate bits automatically: choose a width for each tensor of a source, under a goal for the whole model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aq_jax.calibration.knapsack import pareto_frontier
from aq_jax.calibration.sensitivity import FloatOutputs, input_hessians, sensitivities
from aq_jax.calibration.solve import match_tensors, read_float_weights, tokenize_lines
from aq_jax.calibration.text import choose_common_length, pad_to_one_shape, read_text
from aq_jax.config import AllocationConfig, CalibrationConfig, Override, QuantizationConfig
from aq_jax.errors import ConfigError
from aq_jax.nn.models import Model
from aq_jax.progress import Progress
from aq_jax.quantizers.lookup import calibrated_quantizer
from aq_jax.quantizers.treatment import Treatment, is_weight, treat
from aq_jax.store.files import atomic_write

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

FEWEST_OTHERS = 8  # sentences beside the calibration's; with fewer, errors are measured on the calibration's own
# Times as many sentences as each tensor's error is measured on: for Hessians, and to judge the whole model.
HESSIAN_FACTOR, JUDGE_FACTOR = 4, 2


@dataclass(frozen=True)
class WidthChoice:
    """The width that one tensor gets.

    Args:
        name: The tensor's name.
        shape: The tensor's shape.
        quant_type: The chosen quant_type.
        bits: The bits that the tensor takes, with its scales and zero points.
        error: The predicted 1 - cosine when this tensor alone is quantized.
        override: The override that sets the width; None if the config fixed it.
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bits: int
    error: float
    override: Override | None

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def bpw(self) -> float:
        return self.bits / self.params


@dataclass(frozen=True)
class Allocation:
    """The widths that were chosen for a model's tensors, and what is needed to judge them.

    Args:
        choices: The widths of all tensors that the model uses and that could be quantized.
        goal: The budget of bits, or the limit of error.
        uniform: By width, (bits a weight, predicted cosine) if all free tensors had it.
        config: The model's config, with the chosen overrides first.
        outputs: The float model's outputs, on texts that nothing else was measured on, if any were left.
        sentences: The number of those texts.
        held_out: Whether the calibration did not see them.
        seconds: The time that the allocation took.
    """

    choices: tuple[WidthChoice, ...]
    goal: AllocationConfig
    uniform: Mapping[str, tuple[float, float]]
    config: QuantizationConfig
    outputs: FloatOutputs
    sentences: int
    held_out: bool
    seconds: float

    @property
    def bpw(self) -> float:
        return sum(choice.bits for choice in self.choices) / sum(choice.params for choice in self.choices)

    @property
    def predicted_cosine(self) -> float:
        """Predict the cosine between the float model's outputs and the quantized one's."""
        return 1 - sum(choice.error for choice in self.choices)

    def record(self, quantized: Model | None = None) -> dict[str, Any]:
        """Build the record for a table's metadata; with the measured cosine, if there is a quantized model."""
        goal = {"target_bpw": self.goal.target_bpw} if self.goal.target_bpw else {"min_cosine": self.goal.min_cosine}
        found = goal | {
            "widths": list(self.goal.widths), "bpw": self.bpw, "predicted_cosine": self.predicted_cosine,
            "uniform": {width: {"bpw": bpw, "predicted_cosine": c} for width, (bpw, c) in self.uniform.items()},
            "tensors": [
                {"name": c.name, "shape": list(c.shape), "quant_type": c.quant_type, "bpw": c.bpw, "error": c.error,
                 "chosen": c.override is not None}
                for c in self.choices
            ],
            "seconds": self.seconds,
        }  # fmt: skip
        if quantized is not None:
            found |= {"cosine": 1 - self.outputs.distance(quantized), "sentences": self.sentences}
            found["held_out"] = self.held_out
        return found

    def save(self, path: str | Path) -> None:
        """Write the widths as a plan: a file of [[override]] tables, which a config's `plan` takes."""
        lines = [
            f"# A plan of aq-jax: {self.bpw:.3f} bits a weight, predicted cosine {self.predicted_cosine:.4f}.",
            '# Edit it, and use it: plan = "FILE" in a config. The first pattern that matches counts.',
        ]
        for choice in self.choices:
            said = f"{choice.params:,} weights, {choice.bpw:.3f} bits each, predicted error {choice.error:.2e}"
            if choice.override is None:
                lines += ["", f"# {_toml(choice.name)}: {choice.quant_type}, as the config says; {said}"]
                continue
            given = choice.override.to_dict()
            lines += ["", "[[override]]", f"# {said}", *(f"{key} = {_toml(value)}" for key, value in given.items())]
        with atomic_write(Path(path)) as temporary:
            temporary.write_text("\n".join(lines) + "\n", "utf-8")


def allocate(
    source: Source,
    folder: Path,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    goal: AllocationConfig,
    progress: Progress | None = None,
) -> Allocation:
    """Choose a width for each linear and each embedding table.

    Each tensor is quantized alone, in each width, and the float model runs with it. The error of an allocation is the
    sum of those errors, and the best allocation is taken (see `calibration.knapsack`). Tensors whose quant_type an
    override or mixed_precision_layers fixes keep it, and so do those whose solver does not run the model.

    Args:
        source: The float weights.
        folder: The folder that holds config.json and tokenizer files.
        config: The model's config: groups, symmetry and rotation of the widths below eight bits. Eight bits are per
            channel, symmetric and not rotated.
        calibration: The calibration's text; errors are measured on the lines that it leaves, if there are any.
        goal: The budget of bits, or the limit of error.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError: for a goal that no allocation reaches, a file without text, and grids that the solver does not
            have.
        FormatError: for a model of an unknown family.
        AqError: for weights that are not finite, by name.
    """
    start = time.perf_counter()
    architecture, names = match_tensors(source, folder)
    shapes = {
        path: source.shapes[name][0] for path, name in names.items() if is_weight(config, name, *source.shapes[name])
    }
    options = {path: _width_options(names[path], path, *source.shapes[names[path]], config, goal) for path in shapes}
    if not any(override for each in options.values() for override, _ in each):
        raise ConfigError(
            f"[allocate]: overrides fix the quant_type of every tensor of {folder}, and leave nothing to choose; "
            "take a quant_type out of one, or leave [allocate] out"
        )
    sizes = [[treatment.compressed_bits for _, treatment in each] for each in options.values()]
    params = sum(math.prod(shape) for shape in shapes.values())
    least, most = sum(map(min, sizes)) / params, sum(map(max, sizes)) / params
    if goal.target_bpw is not None and goal.target_bpw < least:
        raise ConfigError(
            f"[allocate]: target_bpw = {goal.target_bpw}: widths {', '.join(goal.widths)} give {least:.3f} to "
            f"{most:.3f} bits a weight, scales and tensors of a fixed quant_type included; ask for more, or take "
            "narrower widths or larger groups"
        )
    weights = read_float_weights(source, names)
    most_lines = min(calibration.sentences + (1 + JUDGE_FACTOR) * goal.sentences, 2**24)
    lines = read_text(dataclasses.replace(calibration, sentences=most_lines)).lines
    ids, sentences = tokenize_lines(lines, folder, architecture, calibration)
    known, others = ids[: calibration.sentences], ids[calibration.sentences :]
    held_out = len(others) >= FEWEST_OTHERS
    others = others if held_out else known[: (1 + JUDGE_FACTOR) * goal.sentences]
    first = others[: max(1, len(others) // (1 + JUDGE_FACTOR))]
    last = others[len(first) :] or first
    length = choose_common_length([len(text) for text in ids], sentences.max_tokens)
    model = architecture.fill(weights, "float32", str(folder))
    settings = sentences if architecture.family.task == "embed" else None
    outputs = FloatOutputs(model, pad_to_one_shape(first, length), settings)
    hessians = input_hessians(
        model, pad_to_one_shape(known[: HESSIAN_FACTOR * goal.sentences], length), calibration.seed
    )
    total = sum(4 * math.prod(shape) for shape in shapes.values())

    def report(path: str) -> None:
        if progress is not None:
            progress(f"measuring {names[path]}", 4 * math.prod(shapes[path]), total)

    errors = sensitivities(
        model,
        {path: [treatment.policy for _, treatment in each] for path, each in options.items()},
        outputs, hessians, calibration.damping, np.unique([i for text in first for i in text[:length]]), report,
    )  # fmt: skip
    tensors = [list(zip(bits, errors[path], strict=True)) for path, bits in zip(options, sizes, strict=True)]
    front = pareto_frontier(tensors)
    if goal.target_bpw is not None:
        best = front.best_within(bits=math.floor(goal.target_bpw * params))
    else:
        best = front.best_within(error=1 - (goal.min_cosine or 0))
    if best is None:
        raise ConfigError(
            f"[allocate]: min_cosine = {goal.min_cosine}: widths {', '.join(goal.widths)} reach a predicted "
            f"{1 - front.errors.min():.4f} at most; ask for less, or take wider ones"
        )
    choices = []
    for path, option, each in zip(options, front.options(best), tensors, strict=True):
        (override, treatment), (bits, error) = options[path][option], each[option]
        choices.append(WidthChoice(names[path], shapes[path], treatment.quant_type, bits, error, override))
    chosen = tuple(choice.override for choice in choices if choice.override is not None)
    return Allocation(
        tuple(choices), goal, _uniform_widths(goal.widths, list(options.values()), tensors, params),
        dataclasses.replace(config, overrides=chosen + config.overrides),
        FloatOutputs(model, pad_to_one_shape(last, length), settings, outputs.programs),
        len(last), held_out, time.perf_counter() - start,
    )  # fmt: skip


def _width_options(
    name: str, path: str, shape: tuple[int, ...], dtype: np.dtype, config: QuantizationConfig, goal: AllocationConfig
) -> list[tuple[Override | None, Treatment]]:
    """List a tensor's treatment in each width, and the override that sets it; or the one that the config fixes."""
    policy = config.for_tensor(name)
    matching = next((o for o in config.overrides if re.search(o.pattern, name)), None)
    fixed = policy.quant_type != config.quant_type or (matching is not None and matching.quant_type is not None)
    used = path.endswith(".embedding") or (path.startswith("layers.") and path.endswith(".kernel"))
    quantizer = calibrated_quantizer(policy)
    if fixed or not used or quantizer is None:
        return [(None, treat(config, name, shape, dtype))]
    pattern, found = f"^{re.escape(name)}$", []
    for width in goal.widths:
        base = matching or Override("")
        override = dataclasses.replace(base, pattern=pattern, quant_type=width)
        if width == "fp16":
            override = Override(pattern, "fp16")
        elif width == "int8":
            # All of MiniLM so rounded is predicted to lose 0.0005; GPTQ would take as long as in other widths.
            override = Override(pattern, "int8", per_channel=True, symmetric=True, solver="absmax", rotate=False)
        own = treat(dataclasses.replace(config, overrides=(override,)), name, shape, dtype)
        if own.spec is not None:
            quantizer.check(own.spec, shape, name)
        found.append((override, own))
    return found


def _uniform_widths(
    widths: tuple[str, ...],
    options: list[list[tuple[Override | None, Treatment]]],
    tensors: list[list[tuple[int, float]]],
    params: int,
) -> dict[str, tuple[float, float]]:
    """Compute, by width, bits a weight and the predicted cosine if all free tensors had that width."""
    found = {}
    for i, width in enumerate(widths):
        taken = [each[i if of[0][0] is not None else 0] for of, each in zip(options, tensors, strict=True)]
        found[width] = sum(bits for bits, _ in taken) / params, 1 - sum(error for _, error in taken)
    return found


def _toml(value: str | bool | int) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
