"""Allocate bits automatically: choose a width for each tensor of a source, under a goal for the whole model."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from aq_jax.calibration.distortion import Sampled, StoredSizes, sample_rows, sampled
from aq_jax.calibration.knapsack import pareto_frontier
from aq_jax.calibration.ladder import Option, width_options
from aq_jax.calibration.sensitivity import NOISE, FloatOutputs, input_hessians, sensitivities
from aq_jax.calibration.solve import match_tensors, read_float_weights, tokenize_lines
from aq_jax.calibration.text import choose_common_length, pad_to_one_shape, read_text
from aq_jax.config import AllocationConfig, CalibrationConfig, Compression, Override, QuantizationConfig
from aq_jax.config.schema import PLAN
from aq_jax.errors import ConfigError
from aq_jax.nn.models import Model
from aq_jax.progress import Progress
from aq_jax.quantizers.treatment import is_weight
from aq_jax.store.files import atomic_write

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source
    from aq_jax.store.inspection import Layer

FEWEST_OTHERS = 8  # sentences beside the calibration's; with fewer, errors are measured on the calibration's own
# Times as many sentences as each tensor's error is measured on: for Hessians, and to judge the whole model.
HESSIAN_FACTOR, JUDGE_FACTOR = 4, 2
HEADERS = 256  # bytes of a file's pages, which only a tiny model's budget notices


@dataclass(frozen=True)
class WidthChoice:
    """The width that one tensor gets.

    Args:
        name: The tensor's name.
        shape: The tensor's shape.
        quant_type: The chosen quant_type.
        bits: The bits that the tensor takes in the file, with its scales and zero points.
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
            "widths": list(self.goal.widths), "bpw": self.bpw,
            "predicted_cosine": self.predicted_cosine,
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

    def budget_note(self, layers: Iterable[Layer]) -> list[str]:
        """Write the note about a file, given its tensors, that takes more than the budget, if it does."""
        names = {choice.name for choice in self.choices}
        found = 8 * sum(layer.bytes for layer in layers if layer.name in names) / sum(c.params for c in self.choices)
        if self.goal.target_bpw is None or found <= self.goal.target_bpw:
            return []
        return [
            f"[allocate]: the file takes {found:.4f} bits a weight, more than target_bpw = {self.goal.target_bpw}: its "
            "scales compress less than those of the samples did, or a tensor was kept; ask for as much less"
        ]

    def save(self, path: str | Path) -> None:
        """Write the widths as a plan: a file of [[override]] tables, which a config's `plan` takes."""
        lines = [
            f"{PLAN}: {self.bpw:.3f} bits a weight, predicted cosine {self.predicted_cosine:.4f}.",
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
    progress: Progress | None,
    output: str,
    compression: Compression,
) -> Allocation:
    """Choose a width for each linear and each embedding table.

    The float model runs with noise in each tensor alone (see `calibration.sensitivity`), and a sample of the tensor is
    quantized in each width, to scale the noise by and to learn how scales compress (`calibration.distortion`). The
    error of an allocation is the sum of its tensors' errors, and the best allocation is taken (`calibration.knapsack`).
    Tensors whose quant_type an override or mixed_precision_layers fixes keep it, and so do those whose solver does not
    run the model.

    Args:
        source: The float weights.
        folder: The folder that holds config.json and tokenizer files.
        config: The model's config: groups, symmetry and rotation. Eight bits have a scale a channel, and a code that
            cannot have such grids has its own.
        calibration: The calibration's text; errors are measured on the lines that it leaves, if there are any.
        goal: The budget of bits, or the limit of error, with the widths to choose from.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.
        output: The path of the file, which says how scales are stored.
        compression: The compression of the file's codes.

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
    ladders = {path: width_options(names[path], path, *source.shapes[names[path]], config, goal) for path in shapes}
    if not any(option.override for each in ladders.values() for option in each):
        raise ConfigError(
            f"[allocate]: overrides fix the quant_type of every tensor of {folder}, and leave nothing to choose; "
            "take a quant_type out of one, or leave [allocate] out"
        )
    most_lines = min(calibration.sentences + (1 + JUDGE_FACTOR) * goal.sentences, 2**24)
    lines = read_text(dataclasses.replace(calibration, sentences=most_lines)).lines
    weights = read_float_weights(source, names)
    samples = {path: sample_rows(np.asarray(weights[names[path]])) for path in shapes}
    found = {
        path: [sampled(samples[path], option.treatment, names[path]) for option in each]
        for path, each in ladders.items()
    }
    stored = StoredSizes(
        [(o.treatment, f) for path, each in ladders.items() for o, f in zip(each, found[path], strict=True)],
        PurePath(output).suffix, compression,
    )  # fmt: skip
    sizes = [[stored.bits(option.treatment) for option in each] for each in ladders.values()]
    params = sum(math.prod(shape) for shape in shapes.values())
    least, most = sum(map(min, sizes)) / params, sum(map(max, sizes)) / params
    if goal.target_bpw is not None and goal.target_bpw * params < sum(map(min, sizes)) + 8 * HEADERS:
        raise ConfigError(
            f"[allocate]: target_bpw = {goal.target_bpw}: widths {', '.join(goal.widths)} give {least:.3f} to "
            f"{most:.3f} bits a weight, scales and tensors of a fixed quant_type included; ask for more, or take "
            "narrower widths or larger groups"
        )
    ids, sentences, _ = tokenize_lines(lines, folder, architecture, calibration)
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

    specs = {path: [option.treatment.spec for option in each] for path, each in ladders.items()}
    # Noise in tensors that no option solves on the model is white: the Hessian of a table of two rows says little.
    shaped = {path: hessians[path] for path in hessians.keys() & ladders.keys() if any(map(_shaped, ladders[path]))}
    measured = sensitivities(
        model, {path: max(spec.rotation if spec else 0 for spec in each) for path, each in specs.items()}, outputs,
        shaped, calibration.damping, np.unique([i for text in first for i in text[:length]]), calibration.seed,
        report,
    )  # fmt: skip

    def predicted(path: str, option: Option, found: Sampled) -> float:
        return measured[path].distance * (1 if _shaped(option) else measured[path].white) * found.distortion / NOISE

    tensors = [
        [(bits, predicted(path, o, f)) for bits, o, f in zip(sized, ladders[path], found[path], strict=True)]
        for path, sized in zip(ladders, sizes, strict=True)
    ]
    front = pareto_frontier(tensors)
    if goal.target_bpw is not None:
        best = front.best_within(bits=math.floor(goal.target_bpw * params) - 8 * HEADERS)
    else:
        best = front.best_within(error=1 - (goal.min_cosine or 0))
    if best is None:
        raise ConfigError(
            f"[allocate]: min_cosine = {goal.min_cosine}: widths {', '.join(goal.widths)} reach a predicted "
            f"{1 - front.errors.min():.6f} at most; ask for less, or take wider ones"
        )
    choices = []
    for path, taken, each in zip(ladders, front.options(best), tensors, strict=True):
        option, (bits, error) = ladders[path][taken], each[taken]
        kind = option.treatment.quant_type
        choices.append(WidthChoice(names[path], shapes[path], kind, bits, error, option.override))
    chosen = tuple(choice.override for choice in choices if choice.override is not None)
    return Allocation(
        tuple(choices), goal, _uniform_widths(goal.widths, list(ladders.values()), tensors, params),
        dataclasses.replace(config, overrides=chosen + config.overrides),
        FloatOutputs(model, pad_to_one_shape(last, length), settings, outputs.programs),
        len(last), held_out, time.perf_counter() - start,
    )  # fmt: skip


def _shaped(option: Option) -> bool:
    """Tell whether an option's codes are chosen under the Hessian of the tensor's inputs."""
    return option.treatment.quantizer is not None and option.treatment.quantizer.needs == "inputs"


def _uniform_widths(
    widths: tuple[str, ...], ladders: list[list[Option]], tensors: list[list[tuple[int, float]]], params: int
) -> dict[str, tuple[float, float]]:
    """Compute, by width, bits a weight and the predicted cosine if all free tensors had that width."""
    found = {}
    for i, width in enumerate(widths):
        taken = [each[i if of[0].override else 0] for of, each in zip(ladders, tensors, strict=True)]
        found[width] = sum(bits for bits, _ in taken) / params, 1 - sum(error for _, error in taken)
    return found


def _toml(value: str | bool | int) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
