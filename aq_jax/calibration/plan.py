"""Automatic mixed precision: from a source of weights and a goal to a plan, an override for each tensor."""

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

from aq_jax.calibration.allocate import frontier
from aq_jax.calibration.sensitivity import Outputs, input_moments, sensitivities
from aq_jax.calibration.solve import read_ids, read_names, read_weights
from aq_jax.calibration.text import common_length, one_shape, read_text
from aq_jax.config import AllocationConfig, CalibrationConfig, Override, QuantizationConfig
from aq_jax.errors import ConfigError
from aq_jax.nn.models import Model
from aq_jax.progress import Progress
from aq_jax.quantizers.lookup import calibrated_by
from aq_jax.quantizers.treatment import Treatment, is_weight, treat
from aq_jax.store.files import replacing

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

FEWEST = 8  # sentences beside the calibration's; with fewer, errors are measured on those
# Times as many sentences as each tensor's error is measured on: for moments, and to see how good the model is.
MOMENTS, LAST = 4, 2


@dataclass(frozen=True)
class Choice:
    """What a plan says of one tensor.

    Args:
        name: of the tensor.
        shape: of the tensor.
        quant_type: that it has.
        bits: that it takes, scales and zero points with it.
        error: 1 - cosine that it alone is predicted to cost.
        override: what makes it so; None if the config did.
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
    """A plan, and what is needed to see how good it was.

    Args:
        choices: of every tensor that the model uses and that could be quantized.
        goal: what it was made for.
        uniform: of each width, if all tensors that are chosen for had it: (bits a weight, predicted cosine).
        config: of the model, with the plan's overrides first.
        outputs: of the float model, on texts that nothing else was measured on, if there were any left.
        sentences: how many those are.
        held_out: whether they are others than those of the calibration.
        seconds: that it took.
    """

    choices: tuple[Choice, ...]
    goal: AllocationConfig
    uniform: Mapping[str, tuple[float, float]]
    config: QuantizationConfig
    outputs: Outputs
    sentences: int
    held_out: bool
    seconds: float

    @property
    def bpw(self) -> float:
        return sum(choice.bits for choice in self.choices) / sum(choice.params for choice in self.choices)

    @property
    def predicted(self) -> float:
        """The cosine that the model is predicted to have."""
        return 1 - sum(choice.error for choice in self.choices)

    def record(self, quantized: Model | None = None) -> dict[str, Any]:
        """For a table's metadata; with the real cosine, if there is a quantized model."""
        goal = {"target_bpw": self.goal.target_bpw} if self.goal.target_bpw else {"min_cosine": self.goal.min_cosine}
        found = goal | {
            "widths": list(self.goal.widths), "bpw": self.bpw, "predicted_cosine": self.predicted,
            "uniform": {width: {"bpw": bpw, "predicted_cosine": c} for width, (bpw, c) in self.uniform.items()},
            "tensors": [
                {"name": c.name, "shape": list(c.shape), "quant_type": c.quant_type, "bpw": c.bpw, "error": c.error,
                 "chosen": c.override is not None}
                for c in self.choices
            ],
            "seconds": self.seconds,
        }  # fmt: skip
        if quantized is not None:
            found |= {"cosine": 1 - self.outputs.change(quantized), "sentences": self.sentences}
            found["held_out"] = self.held_out
        return found

    def save(self, path: str | Path) -> None:
        """Write the plan as [[override]] tables, which a config's `plan` takes."""
        lines = [
            f"# A plan of aq-jax: {self.bpw:.3f} bits a weight, predicted cosine {self.predicted:.4f}.",
            '# Edit it, and use it: plan = "FILE" in a config. The first pattern that matches counts.',
        ]
        for choice in self.choices:
            said = f"{choice.params:,} weights, {choice.bpw:.3f} bits each, predicted error {choice.error:.2e}"
            if choice.override is None:
                lines += ["", f"# {_toml(choice.name)}: {choice.quant_type}, as the config says; {said}"]
                continue
            given = choice.override.to_dict()
            lines += ["", "[[override]]", f"# {said}", *(f"{key} = {_toml(value)}" for key, value in given.items())]
        with replacing(Path(path)) as temporary:
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

    Each is quantized alone, in each width, and the float model is run with it; the errors of a plan are the sum of
    those, and the plan is the best one (see `calibration.allocate`). Tensors whose quant_type an override or
    mixed_precision_layers says, and those that no solver of the config runs the model for, are not chosen for.

    Args:
        source: of float weights.
        folder: holds config.json and tokenizer files.
        config: of the model: groups, symmetry and rotation of the widths below eight bits. Eight bits are per channel,
            symmetric and not rotated.
        calibration: of which text; lines are measured on that it leaves, if there are.
        goal: what the plan is for.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError: for a goal that no plan reaches, text that is none, and grids that the solver does not have.
        FormatError: for a model that is not known here.
        AqError: for weights that are not finite, by name.
    """
    start = time.perf_counter()
    architecture, names = read_names(source, folder)
    shapes = {
        path: source.shapes[name][0] for path, name in names.items() if is_weight(config, name, *source.shapes[name])
    }
    options = {path: _options(names[path], path, *source.shapes[names[path]], config, goal) for path in shapes}
    if not any(override for each in options.values() for override, _ in each):
        raise ConfigError(f"[allocate]: overrides fix the quant_type of every tensor of {folder}: nothing is left")
    sizes = [[treatment.compressed_bits for _, treatment in each] for each in options.values()]
    params = sum(math.prod(shape) for shape in shapes.values())
    least, most = sum(map(min, sizes)) / params, sum(map(max, sizes)) / params
    if goal.target_bpw is not None and goal.target_bpw < least:
        raise ConfigError(
            f"[allocate]: target_bpw = {goal.target_bpw}: found {least:.3f} to {most:.3f} bits a weight, scales and "
            f"tensors of a fixed quant_type counted, with widths {', '.join(goal.widths)}; take more, narrower "
            "widths, or larger groups"
        )
    weights = read_weights(source, names)
    most_lines = min(calibration.sentences + (1 + LAST) * goal.sentences, 2**24)
    lines = read_text(dataclasses.replace(calibration, sentences=most_lines)).lines
    ids, sentences = read_ids(lines, folder, architecture, calibration)
    known, others = ids[: calibration.sentences], ids[calibration.sentences :]
    held_out = len(others) >= FEWEST
    others = others if held_out else known[: (1 + LAST) * goal.sentences]
    first = others[: max(1, len(others) // (1 + LAST))]
    last = others[len(first) :] or first
    length = common_length([len(text) for text in ids], sentences.max_tokens)
    model = architecture.fill(weights, "float32", str(folder))
    said = sentences if architecture.family.task == "embed" else None
    outputs = Outputs(model, one_shape(first, length), said)
    moments = input_moments(model, one_shape(known[: MOMENTS * goal.sentences], length), calibration.seed)
    total = sum(4 * math.prod(shape) for shape in shapes.values())

    def report(path: str) -> None:
        if progress is not None:
            progress(f"measuring {names[path]}", 4 * math.prod(shapes[path]), total)

    errors = sensitivities(
        model,
        {path: [treatment.policy for _, treatment in each] for path, each in options.items()},
        outputs, moments, calibration.damping, np.unique([i for text in first for i in text[:length]]), report,
    )  # fmt: skip
    tensors = [list(zip(bits, errors[path], strict=True)) for path, bits in zip(options, sizes, strict=True)]
    plans = frontier(tensors)
    if goal.target_bpw is not None:
        plan = plans.within(bits=math.floor(goal.target_bpw * params))
    else:
        plan = plans.within(error=1 - (goal.min_cosine or 0))
    if plan is None:
        raise ConfigError(
            f"[allocate]: min_cosine = {goal.min_cosine}: found {1 - plans.errors.min():.4f} at most, predicted, with "
            f"widths {', '.join(goal.widths)}; take less, or wider ones"
        )
    choices = []
    for path, option, each in zip(options, plans.options(plan), tensors, strict=True):
        (override, treatment), (bits, error) = options[path][option], each[option]
        choices.append(Choice(names[path], shapes[path], treatment.quant_type, bits, error, override))
    chosen = tuple(choice.override for choice in choices if choice.override is not None)
    return Allocation(
        tuple(choices), goal, _uniform(goal.widths, list(options.values()), tensors, params),
        dataclasses.replace(config, overrides=chosen + config.overrides),
        Outputs(model, one_shape(last, length), said, outputs.programs),
        len(last), held_out, time.perf_counter() - start,
    )  # fmt: skip


def _options(
    name: str, path: str, shape: tuple[int, ...], dtype: np.dtype, config: QuantizationConfig, goal: AllocationConfig
) -> list[tuple[Override | None, Treatment]]:
    """What a tensor can be: one treatment for each width, and what makes it so; or that which the config has for it."""
    policy = config.for_tensor(name)
    matching = next((o for o in config.overrides if re.search(o.pattern, name)), None)
    fixed = policy.quant_type != config.quant_type or (matching is not None and matching.quant_type is not None)
    used = path.endswith(".embedding") or (path.startswith("layers.") and path.endswith(".kernel"))
    quantizer = calibrated_by(policy)
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


def _uniform(
    widths: tuple[str, ...],
    options: list[list[tuple[Override | None, Treatment]]],
    tensors: list[list[tuple[int, float]]],
    params: int,
) -> dict[str, tuple[float, float]]:
    """Of each width: bits a weight and predicted cosine, all tensors that are chosen for having it."""
    found = {}
    for i, width in enumerate(widths):
        taken = [each[i if of[0][0] is not None else 0] for of, each in zip(options, tensors, strict=True)]
        found[width] = sum(bits for bits, _ in taken) / params, 1 - sum(error for _, error in taken)
    return found


def _toml(value: str | bool | int) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
